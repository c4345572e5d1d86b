"""Who samples the phase: ours in slots, the reference in blocks, `generate` as TRL calls it, and
vLLM.

Each is built once and run many times; a run leaves nothing behind and returns what was sampled.

Dimensions
    M  positions;  G  thoughts per position;  N = M * G;  L  thought tokens
    R  rows of a batch
"""

import copy
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from transformers import GenerationConfig, PreTrainedModel

from rlp.model import attention
from rlp.model.policy import Policy
from rlp.sampling.graph import CudaRecorder
from rlp.sampling.native import NativeSampler
from rlp.sampling.sampler import Sampler
from sampling_phase.blocks import BlockSampler
from sampling_phase.closing import Closing
from sampling_phase.setting import Setting
from update_step.given import CLOSE, PAD, TEMPERATURE, THOUGHT_FORMAT

SLOTS, BLOCKS, GENERATE, VLLM = "slots", "blocks", "generate", "vLLM"
EAGER = "slots, eager"
"""On a GPU, where `slots` replays a recorded step."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a contender has sampled."""

    lengths: np.ndarray
    """[N] tokens of each thought."""
    tokens: np.ndarray | None
    """[N, L], 0 behind a thought; None where they are none of the others'."""


class Contender(Protocol):
    def run(self) -> Sampled:
        """One phase."""


class Ours:
    """A sampler of ours, with keyed noise."""

    def __init__(self, sampler: Sampler, setting: Setting) -> None:
        self._sampler, self._setting = sampler, setting

    def run(self) -> Sampled:
        setting = self._setting
        with self._sampler.phase():
            rollout = self._sampler.sample(
                setting.documents,
                setting.positions,
                THOUGHT_FORMAT,
                setting.noise(),
                group_size=setting.group_size,
                max_thought_tokens=setting.max_thought_tokens,
            )
        tokens, mask = (
            rearrange(part.cpu().numpy(), "m g l -> (m g) l")
            for part in (rollout.thoughts.tokens, rollout.thoughts.mask)
        )
        return Sampled(mask.sum(axis=1), tokens)


class Generate:
    """`generate` of transformers as TRL's GRPOTrainer calls it: prompts repeated G times and padded
    on the left, R rows until the last of them has ended."""

    def __init__(self, lm: PreTrainedModel, setting: Setting, rows: int) -> None:
        self._lm, self._setting, self._rows = lm, setting, rows
        self._settings = GenerationConfig(
            max_new_tokens=setting.max_thought_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=1.0,
            top_k=0,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=CLOSE,
            disable_compile=True,
        )

    def run(self) -> Sampled:
        prompts = [prompt for prompt in self._setting.prompts() for _ in range(self._group)]
        lengths = self._setting.lengths.flatten()
        starts = range(0, len(prompts), self._rows)
        parts = [
            self._batch(prompts[start : start + self._rows], lengths[start : start + self._rows])
            for start in starts
        ]
        return Sampled(np.concatenate(parts), None)

    @property
    def _group(self) -> int:
        return self._setting.group_size

    @torch.no_grad()
    def _batch(self, prompts: list[list[int]], lengths: np.ndarray) -> np.ndarray:
        """The lengths [R] that came out."""
        most, device = max(len(prompt) for prompt in prompts), self._lm.device
        tokens = torch.tensor([[PAD] * (most - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (most - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tokens = tokens.to(device)
        closing = Closing(lengths, tokens, self._setting.max_thought_tokens)
        found = self._lm.generate(
            input_ids=tokens,
            attention_mask=mask.to(device),
            generation_config=self._settings,
            logits_processor=[closing],
        )[:, most:]
        is_close = (found == CLOSE).cpu().numpy()
        return np.where(is_close.any(axis=1), is_close.argmax(axis=1) + 1, is_close.shape[1])


class Vllm:
    """vLLM alone, one request a thought, with its prefix cache. A request ends by its length."""

    def __init__(self, lm: PreTrainedModel, setting: Setting, rows: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its time is this process's
        from vllm import LLM

        self._setting = setting
        self._folder = tempfile.TemporaryDirectory()
        plain = copy.deepcopy(lm)
        plain.get_output_embeddings().bias = None
        plain.save_pretrained(self._folder.name)
        self._engine = LLM(
            model=self._folder.name,
            skip_tokenizer_init=True,
            dtype=str(lm.dtype).removeprefix("torch."),
            max_num_seqs=rows,
            max_model_len=max(map(len, setting.prompts())) + setting.max_thought_tokens,
            enable_prefix_caching=True,
            gpu_memory_utilization=0.5,
        )

    def run(self) -> Sampled:
        from vllm import SamplingParams

        lengths = self._setting.lengths.flatten().tolist()
        prompts = [
            {"prompt_token_ids": prompt}
            for prompt in self._setting.prompts()
            for _ in range(self._setting.group_size)
        ]
        wanted = [
            SamplingParams(
                temperature=TEMPERATURE, max_tokens=length, ignore_eos=True, logprobs=0, seed=number
            )
            for number, length in enumerate(lengths)
        ]
        outputs = self._engine.generate(prompts, wanted, use_tqdm=False)
        return Sampled(np.array([len(output.outputs[0].token_ids) for output in outputs]), None)


def why_missing(name: str) -> str | None:
    """Why a contender is not there; None where it is."""
    if name == VLLM and importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    return None


def build(name: str, lm: PreTrainedModel, setting: Setting, rows: int) -> Contender:
    """A contender by its name; the network is shared by all.

    Args:
        rows: thoughts side by side, the same for all.
    """
    if name in (SLOTS, EAGER):
        graph = name == SLOTS and lm.device.type == "cuda"
        return Ours(_native(lm, rows, graph), setting)
    if name == BLOCKS:
        return Ours(BlockSampler(_policy(lm), rows=rows, shared=True), setting)
    return {GENERATE: Generate, VLLM: Vllm}[name](lm, setting, rows)


def _native(lm: PreTrainedModel, rows: int, graph: bool) -> Sampler:
    recorder = CudaRecorder if graph else None
    return NativeSampler(_policy(lm), slots=rows, shared=True, recorder=recorder)


def _policy(lm: PreTrainedModel) -> Policy:
    lm.set_attn_implementation(attention.register("sdpa"))
    return Policy(lm, THOUGHT_FORMAT.markers)

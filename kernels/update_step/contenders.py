"""Who does the step: ours by either layout, and TRL's GRPOTrainer, careful and naive.

A contender prepares what is given once, untimed; then `gradient_of` leaves the gradient in the
weights of its network and returns the rewards.

Dimensions
    M  positions;  G  thoughts per position;  N = M * G;  V  vocabulary
    R  rows of a forward
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import transformers
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

import rlp.model.policy
from rlp.model import attention
from rlp.model.layout import Layout, repeated_layout
from rlp.model.policy import Policy
from rlp.model.scoring import score
from rlp.model.thoughts import Thoughts
from rlp.objective import (
    clipped_surrogate,
    group_relative_advantage,
    information_gain,
    log_evidence,
)
from rlp_kernels import token_logprobs
from update_step.given import (
    CLIP,
    EMA_DECAY,
    EOS,
    LEARNING_RATE,
    PAD,
    SEED,
    TEMPERATURE,
    THOUGHT_FORMAT,
    Given,
    Rows,
    Shape,
)


class Stopwatch:
    """Seconds of the named parts of one step: CPU time of this process, or CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, object, object]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Of `sampling`, of `scoring`, of the whole `step`, and of the `update`, the rest of it."""
        if self._on_gpu:
            torch.cuda.synchronize()
        total = {"sampling": 0.0, "scoring": 0.0, "step": 0.0}
        for name, start, stop in self._spans:
            total[name] += start.elapsed_time(stop) / 1000 if self._on_gpu else stop - start
        return total | {"update": total["step"] - total["scoring"] - total["sampling"]}

    def _now(self) -> object:
        if not self._on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Network:
    """The policy, its EMA and its optimizer: the same for every contender."""

    def __init__(
        self,
        config: Qwen3Config,
        device: torch.device,
        dtype: torch.dtype,
        prepare: Callable[[nn.Module], None] = lambda lm: None,
    ) -> None:
        """
        Args:
            prepare: changes the policy before its EMA is copied from it.
        """
        torch.manual_seed(SEED)
        self.lm = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation="sdpa", dtype=dtype
        ).to(device)
        prepare(self.lm)
        self.teacher = copy.deepcopy(self.lm).eval().requires_grad_(False)
        # Fused on a GPU: the other form needs temporaries as large as the weights, which would hide
        # what a step needs.
        self.optimizer = torch.optim.AdamW(
            self.lm.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda"
        )

    @torch.no_grad()
    def update(self) -> None:
        """theta and phi."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        for phi, theta in zip(self.teacher.parameters(), self.lm.parameters(), strict=True):
            phi.lerp_(theta, 1 - EMA_DECAY)

    def gradient(self) -> Tensor:
        """All gradients as one vector."""
        return torch.cat([weight.grad.flatten() for weight in self.lm.parameters()])


class Ours:
    """The training step for one micro-batch of whole groups, given the thoughts."""

    def __init__(self, network: Network, lay_out: Callable, form: str = "auto") -> None:
        """
        Args:
            lay_out: one of `rlp.model.layout.LAYOUTS`.
            form: of the log-probabilities, as in `rlp_kernels.token_logprobs`.
        """
        self.network, self._lay_out, self._form = network, lay_out, form
        if lay_out is not repeated_layout:
            for lm in (network.lm, network.teacher):
                lm.set_attn_implementation(attention.register("sdpa"))
        self.policy = Policy(network.lm, THOUGHT_FORMAT.markers)
        self._teacher = Policy(network.teacher, THOUGHT_FORMAT.markers)

    def prepare(self, given: Given) -> Given:
        """The thoughts with the log-probabilities of this policy, as if it had sampled them."""
        given = given.at(self.policy.device)
        with torch.no_grad():
            scores = score(self.policy, self._layout(given, given.thoughts, no_think=False))
        logprob = rearrange(scores.thought, "(m g) l -> m g l", g=given.thoughts.tokens.shape[1])
        return replace(given, thoughts=replace(given.thoughts, behavior_logprob=logprob))

    def gradient_of(self, given: Given, watch: Stopwatch) -> Tensor:
        """Leave the gradient in the weights; returns the rewards [M, G]."""
        thoughts = given.thoughts
        with self._log_probabilities_by_form():
            with watch.part("scoring"), torch.no_grad():
                baseline = score(self._teacher, self._layout(given, None, no_think=True))
                baseline_logprob = log_evidence(baseline.no_think)
            scores = score(self.policy, self._layout(given, thoughts, no_think=False))

        reasoned_logprob = rearrange(
            log_evidence(scores.target), "(m g) -> m g", g=thoughts.tokens.shape[1]
        )
        reward = information_gain(reasoned_logprob, baseline_logprob)
        advantage = group_relative_advantage(reward)

        surrogate = clipped_surrogate(
            scores.thought,
            rearrange(thoughts.behavior_logprob, "m g l -> (m g) l"),
            rearrange(thoughts.mask, "m g l -> (m g) l"),
            rearrange(advantage, "m g -> (m g)"),
            clip_low=CLIP,
            clip_high=CLIP,
        )
        (surrogate.sum() / thoughts.truncated.numel()).backward()
        return reward.detach()

    def _log_probabilities_by_form(self) -> AbstractContextManager:
        by_form = functools.partial(token_logprobs, form=self._form)
        return mock.patch.object(rlp.model.policy, "token_logprobs", by_form)

    def _layout(self, given: Given, thoughts: Thoughts | None, *, no_think: bool) -> Layout:
        return self._lay_out(
            given.documents,
            given.positions,
            thoughts,
            THOUGHT_FORMAT,
            lm=False,
            no_think=no_think,
            device=self.policy.device,
        )


class Peer:
    """TRL's GRPOTrainer with the information gain as its reward function."""

    def __init__(
        self,
        network: Network,
        shape: Shape,
        folder: Path,
        *,
        careful: bool,
        micro_batch: int,
        checkpointing: bool = False,
        samples: bool = False,
    ) -> None:
        """
        Args:
            samples: whether TRL samples the completions itself; else they are given.
            folder: for TRL's output, which stays empty.
            micro_batch: completions per forward; N is a multiple of it.
        """
        self.network, self._careful, self._micro_batch = network, careful, micro_batch
        self._num_micro_batches = shape.num_thoughts // micro_batch
        self._device = next(network.lm.parameters()).device
        self._trainer = make_trainer(
            network,
            shape,
            folder,
            micro_batch,
            checkpointing,
            None if samples else self._give,
            self._reward,
        )
        self._trainer.current_gradient_accumulation_steps = self._num_micro_batches

    def prepare(self, given: Given) -> Rows:
        """Lists of token ids, as a sampler returns them to TRL.

        TRL takes the policy at hand for the one that sampled.
        """
        return Rows.of(given)

    def gradient_of(self, rows: Rows, watch: Stopwatch) -> Tensor:
        """Leave the gradient in the weights; returns the rewards [M, G]."""
        self._rows, self._watch = rows, watch
        prompts = [{"prompt": self._prompt(n)} for n in range(len(rows.prompts))]
        with self._head_on_completions_alone():
            for _ in range(self._num_micro_batches):
                self._trainer.training_step(self._trainer.model, prompts, num_items_in_batch=None)
        return rearrange(torch.tensor(self._rewards), "(m g) -> m g", m=len(rows.position))

    def _prompt(self, n: int) -> str:
        """Where completions are given nobody reads it; TRL wants the same for all of a group."""
        return str(self._rows.position_of[n])

    def _head_on_completions_alone(self) -> AbstractContextManager:
        """On a CPU, TRL's fused head would score the prompts too.

        See `compact` in trl.trainer.utils.add_fused_lm_head.
        """
        if not self._careful:
            return nullcontext()
        return mock.patch("trl.trainer.utils._use_triton", lambda device: True)

    def _give(self, prompts: list[str], trainer: object) -> dict:
        """TRL's `rollout_func`: the given thoughts in place of sampled ones."""
        return {
            "prompt_ids": self._rows.prompts,
            "completion_ids": self._rows.completions,
            "logprobs": None,
        }

    def _reward(self, completion_ids: list[list[int]], **_: object) -> list[float]:
        """TRL's reward function, for every completion.

        log p(target | prefix, thought) - log p_teacher(target | prefix)
        """
        assert completion_ids == self._rows.completions, (
            "rewards are asked for in the order in which thoughts were given"
        )
        with self._watch.part("scoring"), torch.no_grad():
            reasoned_logprob = self._evidence(self.network.lm, self._rows.closed)
            self._rewards = (reasoned_logprob - self._baseline()).tolist()
        return self._rewards

    def _baseline(self) -> Tensor:
        """[N] the teacher's log-probability of each completion's target, without the thought."""
        rows, teacher = self._rows, self.network.teacher
        if not self._careful:
            marker = len(THOUGHT_FORMAT.markers.open)
            return self._evidence(teacher, [prompt[:-marker] for prompt in rows.prompts])

        document = torch.from_numpy(rows.document).to(self._device)
        states = teacher.base_model(input_ids=document[None], use_cache=False).last_hidden_state
        hidden = states[0, rows.position - 1]
        return target_logprob(teacher.lm_head(hidden), document[rows.position])[rows.position_of]

    def _evidence(self, lm: nn.Module, contexts: list[list[int]]) -> Tensor:
        """[N] log p(target | context), micro-batch by micro-batch."""
        target = torch.from_numpy(self._rows.target).to(self._device)
        parts = []
        for start in range(0, len(contexts), self._micro_batch):
            rows = slice(start, start + self._micro_batch)
            parts.append(target_logprob(self._last_logits(lm, contexts[rows]), target[rows]))
        return torch.cat(parts)

    def _last_logits(self, lm: nn.Module, contexts: list[list[int]]) -> Tensor:
        """[R, V] the logits after each context.

        Causal rows padded on the right need no mask, and SDPA is faster without.
        """
        lengths = [len(context) for context in contexts]
        padded = [context + [PAD] * (max(lengths) - len(context)) for context in contexts]
        tokens = torch.tensor(padded, device=self._device)
        last = (torch.arange(len(contexts)), torch.tensor(lengths) - 1)

        if not self._careful:
            return lm(input_ids=tokens, use_cache=False).logits[last]
        states = lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return lm.lm_head(states[last])


def target_logprob(logits: Tensor, target: Tensor) -> Tensor:
    """[R, V], [R] -> [R] log-probability at temperature 1, the open marker out of the softmax."""
    logits = logits.float()
    logits[:, THOUGHT_FORMAT.markers.excluded] = float("-inf")
    return logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]


def make_trainer(
    network: Network,
    shape: Shape,
    folder: Path,
    micro_batch: int,
    checkpointing: bool,
    give: Callable | None,
    reward: Callable,
):
    """A `trl.GRPOTrainer` whose loss is eq. 8 with eq. 7's advantage."""
    import trl
    from datasets import Dataset

    args = trl.GRPOConfig(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=next(network.lm.parameters()).device.type == "cpu",
        bf16=False,
        seed=SEED,
        learning_rate=LEARNING_RATE,
        num_generations=shape.group_size,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=shape.num_thoughts // micro_batch,
        loss_type="grpo",
        scale_rewards="none",
        reward_weights=[shape.group_size / (shape.group_size - 1)],
        beta=0.0,
        epsilon=CLIP,
        temperature=TEMPERATURE,
        max_completion_length=shape.thought_tokens,
        gradient_checkpointing=checkpointing,
    )
    return trl.GRPOTrainer(
        model=network.lm,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [str(m) for m in range(shape.positions)]}),
        processing_class=word_tokenizer(network.lm.config.vocab_size),
        optimizers=(network.optimizer, None),
        rollout_func=give,
    )


@functools.cache
def word_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """One token per word: TRL reads prompts and decodes completions, whatever the reward reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{token}": token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=f"w{PAD}",
        eos_token=f"w{EOS}",
    )

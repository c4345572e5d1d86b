"""The policy: a causal language model that thinks and predicts.

Any `AutoModelForCausalLM` whose logits are a matrix product of its last hidden state (with an
optional bias, scale and soft cap) works; `admission` proves that of a loaded model, and refuses
one that breaks it. Training state, layouts and rewards are not known here.

Dimensions
    R  rows of tokens, padded on the right (scoring) or on the left (prefill)
    T  tokens in a row
    Q  queries: places where a log-probability is wanted
    D  width;  V  vocabulary
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from rlp.model.attention import Attends, Tree
from rlp.model.markers import Markers
from rlp_kernels import token_argmax, token_entropy, token_logprobs


class Policy(nn.Module):
    """pi_theta and p_theta, one network: log-probabilities of given tokens, and cached decoding."""

    def __init__(self, lm: nn.Module, markers: Markers, logprob_form: str = "auto") -> None:
        """
        Args:
            logprob_form: `form` of `token_logprobs`.
        """
        super().__init__()
        self.logprob_form = logprob_form
        self.lm = lm
        self.markers = markers
        signature = inspect.signature(lm.base_model.forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in signature else "cache_params"
        self._takes_positions = "position_ids" in signature
        self._samples, self._wide_head = False, None
        self.logit_scale, self.softcap = _logit_transform(lm.config)
        self.stock_time_step_limit = _scan_as_decoded(lm)
        """What transformers clamps the time steps of this model's scans at, where that was mended
        here; else None."""
        self.why_together: str | None = None
        """Why rows of this model's cache begin together or not at all (`admission`); None where
        each can begin beside others that go on."""
        self.train(self.training)

    @property
    def head(self) -> nn.Parameter:
        """[V, D], the matrix that turns hidden states into logits."""
        return self.lm.get_output_embeddings().weight

    @property
    def head_bias(self) -> nn.Parameter | None:
        """[V], what is added to the logits; None in most models."""
        return getattr(self.lm.get_output_embeddings(), "bias", None)

    def head_parameters(self) -> list[nn.Parameter]:
        """What `forward` reads of the LM head: parameters of a module that it does not call."""
        return [parameter for parameter in (self.head, self.head_bias) if parameter is not None]

    def train(self, mode: bool = True) -> "Policy":
        """As of any module, but the network under it stays in evaluation mode, with its gradient.

        What training mode adds in a language model is noise: dropout, router jitter, dropped
        layers, experts drawn by lot. Sampler and trainer would be two policies, and the ratio of
        eq. 8 not 1 on-policy. One thing else hangs on the mode: a layer recomputes its activations
        (`engine.activation_checkpointing`) in training mode only. Such a layer, not what is in it,
        is in the mode asked for.
        """
        super().train(mode)
        self.lm.eval()
        for layer in self.lm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = mode and layer.gradient_checkpointing
        return self

    @property
    def device(self) -> torch.device:
        return self.head.device

    def forward(self, task: str, *arguments: object) -> object:
        """Every pass goes through here, because an engine that shards weights gathers them around
        `forward`.

        Args:
            task: `logprob`, `logprob_and_greedy`, `logprob_greedy_and_surest`, `entropy`
                (arguments of `_answer`), `next_logits` (of `_next_logits`), `shared_logits` (of
                `_shared_logits`) or `check` (of `_check`).
        """
        if task in ("next_logits", "shared_logits", "check"):
            return getattr(self, f"_{task}")(*arguments)
        return self._answer(task, *arguments)

    def _check(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own logits [T, V] over a row of tokens [1, T], in its dtype, and ours, in
        float32 at least."""
        own = self.lm(input_ids=tokens).logits[0]
        return own, self._logits(self.lm.base_model(input_ids=tokens).last_hidden_state[0])

    def _answer(
        self,
        statistic: str,
        tokens: Tensor,
        position: Tensor | None,
        tree: Tree | None,
        row: Tensor,
        column: Tensor,
        target: Tensor,
        inverse_temperature: Tensor,
        excluded: Tensor,
        asked: Tensor,
    ) -> Tensor:
        """One pass over rows, and a number for each query: of its `target` after
        `tokens[row, : column + 1]`.

        A causal model never looks to the right, so padding on the right needs no mask: it is not
        queried.

        Args:
            statistic: `logprob` (nats, with gradient), `entropy` (nats, of the whole softmax),
                `logprob_and_greedy` (and whether target is the most probable token), or
                `logprob_greedy_and_surest` (and the log-probability of that one).
            tokens: [R, T] int64, padded on the right.
            position: [R, T] int64, or None where a token's position is its column.
            tree: which token attends to which, or None for rows that are plain sequences.
            row, column: [Q] int64, the hidden state that predicts.
            target: [Q] int64, the predicted token.
            inverse_temperature: [Q] float32.
            excluded: [Q] int64, a token left out of the softmax, or -1.
            asked: int64, which queries have one.

        Returns:
            [Q] float32; for `logprob_and_greedy` [Q] bool too, and for the last one [Q] float32
            nats; both are 0 where no token is excluded (thought tokens and documents, whose most
            probable token nobody asks for).
        """
        packed = {} if tree is None else self._packed(tokens, position, tree)
        hidden = self.lm.base_model(input_ids=tokens, use_cache=False, **packed).last_hidden_state
        queried = hidden[row, column] * self.logit_scale

        # A layout's numbers are made on the host: nobody waits for the device to look at them.
        transform = {"softcap": self.softcap, "bias": self.head_bias, "wait": False}
        tempered = {"inverse_temperature": inverse_temperature, "excluded": excluded, **transform}
        if statistic == "entropy":
            return token_entropy(queried, self.head, **tempered)
        logprobs = token_logprobs(queried, self.head, target, **tempered, form=self.logprob_form)
        if statistic == "logprob":
            return logprobs

        chosen = {name: tempered[name][asked] for name in ("inverse_temperature", "excluded")}
        form = self.logprob_form if statistic == "logprob_greedy_and_surest" else None
        best, surest = _most_probable(queried[asked], self.head, chosen, transform, form)
        matched = torch.zeros_like(target, dtype=torch.bool)
        matched = matched.index_copy(0, asked, best == target[asked])
        if surest is None:
            return logprobs, matched
        return logprobs, matched, torch.zeros_like(logprobs).index_copy(0, asked, surest)

    def _packed(self, tokens: Tensor, position: Tensor, tree: Tree | Attends) -> dict:
        """What a forward of a packed row is given besides. A mask of four dimensions is passed
        through unread: the tree says who attends to whom."""
        mask = tokens.new_zeros(1, 1, 1, 1)
        return {"tree": tree, "position_ids": position, "attention_mask": mask}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Evaluation mode without gradients, for prefill and decoding."""
        mode = self.training
        self.eval()
        self._samples = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._samples, self._wide_head = False, None
            self.train(mode)

    def prefill(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, object]:
        """Run prefixes once and keep their cache.

        Args:
            tokens: [R, T] int64, padded on the left.
            mask: [R, T] bool, True on tokens.

        Returns:
            logits [R, V] float32 after the last token, and the cache.
        """
        return self("next_logits", tokens, mask, (mask.long().cumsum(1) - 1).clamp(min=0), None)

    def fork(self, cache: object, index: Tensor) -> None:
        """Rearrange a cache in place: its new row r is the old row index[r], state-space states
        included."""
        cache.reorder_cache(index)

    def decode(self, token: Tensor, mask: Tensor, position: Tensor, cache: object) -> Tensor:
        """Append one token to every row of a cache.

        Args:
            token: [R] int64.
            mask: [R, T] bool over all columns of the cache, the appended one included.
            position: [R] int64, index of the token in its own row.

        Returns:
            logits [R, V] float32 after the token.
        """
        # A recurrent state holds no padding: these models take a mask over the tokens of the call
        # only.
        mask = mask if self._cache_name == "past_key_values" else None
        return self("next_logits", token[:, None], mask, position[:, None], cache)[0]

    def _next_logits(
        self, tokens: Tensor, mask: Tensor | None, position: Tensor, cache: object | None
    ) -> tuple[Tensor, object]:
        """Logits [R, V] after the last column, and the cache with these tokens in it."""
        optional = {"position_ids": position} if self._takes_positions else {}
        if mask is not None:
            optional["attention_mask"] = mask.long()
        output = self.lm.base_model(
            input_ids=tokens, use_cache=True, **{self._cache_name: cache}, **optional
        )
        return self._logits(output.last_hidden_state[:, -1]), getattr(output, self._cache_name)

    def read_trunks(self, tokens: Tensor, position: Tensor, keys: Attends) -> None:
        """Run packed trunks [T], their keys and values held by what attends."""
        self("shared_logits", tokens[None], position[None], keys, False)

    def decode_slots(self, token: Tensor, position: Tensor, keys: Attends) -> Tensor:
        """Run one token [N] of each slot at its position [N]; logits [N, V] float32 after it."""
        return self("shared_logits", token[None], position[None], keys, True)

    def _shared_logits(
        self, tokens: Tensor, position: Tensor, keys: Attends, wanted: bool
    ) -> Tensor | None:
        """Logits of packed tokens [1, T] if wanted; their keys and values are kept in any case."""
        packed = self._packed(tokens, position, keys)
        output = self.lm.base_model(input_ids=tokens, use_cache=False, **packed)
        return self._logits(output.last_hidden_state[0]) if wanted else None

    def _head_in(self, wide: torch.dtype) -> Tensor:
        """The head in another dtype; while sampling it is converted once, and not for each
        token."""
        if self._wide_head is not None:
            return self._wide_head
        head = self.head.to(wide)
        if self._samples and head.dtype != self.head.dtype:
            self._wide_head = head
        return head

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., V] float32 at least, of hidden states [..., D]."""
        hidden = hidden * self.logit_scale
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        if hidden.is_cuda and hidden.dtype != wide:
            logits = torch.mm(hidden, self.head.t(), out_dtype=wide)
        else:
            logits = hidden.to(wide) @ self._head_in(wide).t()
        if self.head_bias is not None:
            logits = logits + self.head_bias.to(wide)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def _logit_transform(config: PretrainedConfig) -> tuple[float, float]:
    """(scale, soft cap) that this architecture applies to its logits, by the names transformers
    uses."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale /= config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale *= config.logit_scale
    if getattr(config, "lm_head_multiplier", None):  # Falcon-H1 multiplies
        scale *= config.lm_head_multiplier
    return scale, getattr(config, "final_logit_softcapping", None) or 0.0


def _scan_as_decoded(lm: nn.Module) -> tuple[float, float] | None:
    """Clamp the time steps of state-space scans as the config says: not at all, in published
    models.

    transformers clamps Nemotron-H and Zamba2 at `time_step_min`, a bound of the initializer, in the
    scan (prefill, scoring) and not in decoding (huggingface/transformers, pull request 48989):
    sampler and scorer would be two policies.

    Returns:
        the other limit that a scan had; None where all had this one.
    """
    limit, stock = tuple(getattr(lm.config, "time_step_limit", None) or (0.0, math.inf)), None
    for module in lm.modules():
        if hasattr(module, "time_step_limit"):
            if tuple(module.time_step_limit) != limit:
                stock = tuple(module.time_step_limit)
            module.time_step_limit = limit
    return stock


@torch.no_grad()
def _most_probable(
    queried: Tensor, head: Tensor, tempered: dict, transform: dict, form: str | None
) -> tuple[Tensor, Tensor | None]:
    """The most probable token after each hidden state; and its log-probability, where the form that
    it is to be computed in is given."""
    best = token_argmax(queried, head, excluded=tempered["excluded"], **transform)
    if form is None:
        return best, None
    return best, token_logprobs(queried, head, best, **tempered, **transform, form=form)

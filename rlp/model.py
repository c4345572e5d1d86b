"""The policy: a causal language model that thinks and predicts, its tokenizer and thought markers.

Any `AutoModelForCausalLM` whose logits are a matrix product of its last hidden state (with an
optional bias, scale and soft cap) works; `admission` proves that of a loaded model, and refuses
one that breaks it. Training state, layouts and rewards are not known here.

Dimensions
    R  rows of tokens, padded on the right (scoring) or on the left (prefill)
    T  tokens in a row
    Q  queries: places where a log-probability is wanted
    D  width;  V  vocabulary
"""

import importlib.util
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rlp_kernels import token_argmax, token_entropy, token_logprobs
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

from rlp.attention import SharedKeys, Tree, register, why_no_tree
from rlp.config import Config, ConfigError, ModelConfig, ThoughtConfig, first_line
from rlp.hub import settle_hub
from rlp.machine import bfloat16_instructions


@dataclass(frozen=True, slots=True)
class Markers:
    """Token ids of the thought markers."""

    open: tuple[int, ...]
    """Put after the prefix, before the thought."""
    close: tuple[int, ...]
    """Sampled at the end of a thought, or forced when the budget ends it."""
    pieces: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Of each token that `thought.add_markers` adds: the tokens that wrote its text before. Its
    rows of embedding and head begin as the mean of theirs. Empty where nothing is added."""

    @property
    def excluded(self) -> int:
        """The first token of the open marker: removed from every target softmax. A policy that has learned
        to think holds mass there, which its no-think prediction would otherwise lack."""
        return self.open[0]


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
        """What transformers clamps the time steps of this model's scans at, where that was mended here; else None."""
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

        What training mode adds in a language model is noise: dropout, router jitter, dropped layers, experts drawn
        by lot. Sampler and trainer would be two policies, and the ratio of eq. 8 not 1 on-policy. One thing else hangs
        on the mode: a layer recomputes its activations (`engine.activation_checkpointing`) in training mode only. Such
        a layer, not what is in it, is in the mode asked for.
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
        """Every pass goes through here, because an engine that shards weights gathers them around `forward`.

        Args:
            task: `logprob`, `logprob_and_greedy`, `greedy`, `entropy` (arguments of `_answer`), `next_logits` (of `_next_logits`),
                `shared_logits` (of `_shared_logits`) or `check` (of `_check`).
        """
        if task in ("next_logits", "shared_logits", "check"):
            return getattr(self, f"_{task}")(*arguments)
        return self._answer(task, *arguments)

    def _check(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own logits [T, V] over a row of tokens [1, T], in its dtype, and ours, in float32 at least."""
        own = self.lm(input_ids=tokens).logits[0]
        return own, self._logits(self.lm.base_model(input_ids=tokens).last_hidden_state[0])

    def _answer(self, statistic: str, tokens: Tensor, position: Tensor | None, tree: Tree | None, row: Tensor, column: Tensor, target: Tensor,
                inverse_temperature: Tensor, excluded: Tensor) -> Tensor:
        """One pass over rows, and a number for each query: log p(target | tokens[row, : column + 1]).

        A causal model never looks to the right, so padding on the right needs no mask: it is not queried.

        Args:
            statistic: `logprob` (nats, with gradient), `greedy` (whether target is the most probable
                token), `entropy` (nats, of the whole softmax), or `logprob_and_greedy`.
            tokens: [R, T] int64, padded on the right.
            position: [R, T] int64, or None where a token's position is its column.
            tree: which token attends to which, or None for rows that are plain sequences.
            row, column: [Q] int64, the hidden state that predicts.
            target: [Q] int64, the predicted token.
            inverse_temperature: [Q] float32.
            excluded: [Q] int64, a token left out of the softmax, or -1.

        Returns:
            [Q] float32, or bool for `greedy`; for `logprob_and_greedy` both, the second False where no token is excluded
            (thought tokens and documents, whose most probable token nobody asks for).
        """
        # A mask of four dimensions is passed through unread: the tree says who attends to whom.
        packed = {} if tree is None else {"tree": tree, "position_ids": position, "attention_mask": tokens.new_zeros(1, 1, 1, 1)}
        hidden = self.lm.base_model(input_ids=tokens, use_cache=False, **packed).last_hidden_state
        queried = hidden[row, column] * self.logit_scale
        transform = {"softcap": self.softcap, "bias": self.head_bias}
        if statistic == "greedy":
            return token_argmax(queried, self.head, excluded=excluded, **transform) == target
        tempered = {"inverse_temperature": inverse_temperature, "excluded": excluded, **transform}
        if statistic == "entropy":
            return token_entropy(queried, self.head, **tempered)
        logprobs = token_logprobs(queried, self.head, target, **tempered, form=self.logprob_form)
        if statistic == "logprob":
            return logprobs
        asked = excluded >= 0
        with torch.no_grad():
            best = token_argmax(queried[asked], self.head, excluded=excluded[asked], **transform)
        return logprobs, torch.zeros_like(asked).masked_scatter(asked, best == target[asked])

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
        """Rearrange a cache in place: its new row r is the old row index[r], state-space states included."""
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
        # A recurrent state holds no padding: these models take a mask over the tokens of the call only.
        mask = mask if self._cache_name == "past_key_values" else None
        return self("next_logits", token[:, None], mask, position[:, None], cache)[0]

    def _next_logits(self, tokens: Tensor, mask: Tensor | None, position: Tensor, cache: object | None) -> tuple[Tensor, object]:
        """Logits [R, V] after the last column, and the cache with these tokens in it."""
        optional = {"position_ids": position} if self._takes_positions else {}
        if mask is not None:
            optional["attention_mask"] = mask.long()
        output = self.lm.base_model(input_ids=tokens, use_cache=True, **{self._cache_name: cache}, **optional)
        return self._logits(output.last_hidden_state[:, -1]), getattr(output, self._cache_name)

    def prefill_trunks(self, tokens: Tensor, position: Tensor, keys: SharedKeys) -> None:
        """Run packed trunks [1, T] once and keep their keys and values."""
        self("shared_logits", tokens, position, keys, False)

    def decode_branches(self, token: Tensor, position: Tensor, keys: SharedKeys) -> Tensor:
        """Append one token [N] at its position [N] to every branch; logits [N, V] float32 after it."""
        keys.next_token()
        return self("shared_logits", token[None], position[None], keys, True)

    def _shared_logits(self, tokens: Tensor, position: Tensor, keys: SharedKeys, wanted: bool) -> Tensor | None:
        # A mask of four dimensions is passed through unread: the keys say who attends to whom.
        hidden = self.lm.base_model(input_ids=tokens, position_ids=position, use_cache=False, tree=keys, attention_mask=tokens.new_zeros(1, 1, 1, 1)).last_hidden_state[0]
        return self._logits(hidden) if wanted else None

    def _head_in(self, wide: torch.dtype) -> Tensor:
        """The head in another dtype; while sampling it is converted once, and not for each token."""
        if self._wide_head is not None:
            return self._wide_head
        head = self.head.to(wide)
        if self._samples and head.dtype != self.head.dtype:
            self._wide_head = head
        return head

    def _logits(self, hidden: Tensor) -> Tensor:
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
    """(scale, soft cap) that this architecture applies to its logits, by the names transformers uses."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale /= config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale *= config.logit_scale
    if getattr(config, "lm_head_multiplier", None):  # Falcon-H1 multiplies
        scale *= config.lm_head_multiplier
    return scale, getattr(config, "final_logit_softcapping", None) or 0.0


def _scan_as_decoded(lm: nn.Module) -> tuple[float, float] | None:
    """Clamp the time steps of state-space scans as the config says, which is not at all in published models.

    transformers clamps Nemotron-H and Zamba2 at `time_step_min`, a bound of the initializer, in the scan (prefill, scoring)
    and not in decoding (huggingface/transformers, pull request 48989): sampler and scorer would be two policies.

    Returns:
        the other limit that a scan had; None where all had this one.
    """
    limit, stock = tuple(getattr(lm.config, "time_step_limit", None) or (0.0, math.inf)), None
    for module in lm.modules():
        if hasattr(module, "time_step_limit"):
            stock = tuple(module.time_step_limit) if tuple(module.time_step_limit) != limit else stock
            module.time_step_limit = limit
    return stock


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, from `model.tokenizer` or `model.path`."""
    source, key = config.tokenizer or config.path, "model.tokenizer" if config.tokenizer else "model.path"
    _settle_hub(source, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what is wrong in a file comes as any type
        raise ConfigError(f"model.tokenizer: no tokenizer at {source!r}: {_in_one_line(error)}. {_where_models_live}") from error
    # transformers makes an empty tokenizer of the kind that config.json names where there is nothing to read.
    names = {*tokenizer.vocab_files_names.values(), *_TOKENIZER_FILES} if tokenizer.vocab_files_names else set()
    if names and Path(source).is_dir() and not any(match for name in names for match in Path(source).glob(name)):
        raise ConfigError(f"model.tokenizer: {source!r} holds a model's config and no tokenizer (none of {', '.join(sorted(names))}). "
                          "Write model.tokenizer=FOLDER_OR_HUB_NAME of the one that belongs to it, or put its files there.")
    return tokenizer


_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "*.gguf")
"""What a tokenizer is read from, beside what its class names."""


def _settle_hub(source: str, key: str) -> None:
    """Get ready to ask the Hub for what is not on this machine.

    Raises:
        ConfigError: what is not there is written as a path is.
    """
    if os.path.exists(source):
        return
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ConfigError(f"{key}: there is no file or folder {source!r}. {_where_models_live}")
    settle_hub()


def _in_one_line(error: Exception) -> str:
    """What an error says, on one line: validators of configs name the key on their second."""
    return " ".join(str(error).split())[:400]


_where_models_live = "Write a folder that holds a Hugging Face model, or a Hub name that this machine can reach."


def open_tokenizer(config: Config) -> tuple[PreTrainedTokenizerBase, Markers]:
    """The tokenizer of a config, and its markers: added to it where `thought.add_markers` asks for
    it."""
    tokenizer = load_tokenizer(config.model)
    return tokenizer, find_markers(tokenizer, config.thought)


def find_markers(tokenizer: PreTrainedTokenizerBase, config: ThoughtConfig) -> Markers:
    """Token ids of the two markers. With `add_markers`, one of several tokens becomes a single new
    one.

    Raises:
        ConfigError: the tokenizer can not write a marker, or one of them stands inside the other.
    """
    texts = {"thought.open_marker": config.open_marker, "thought.close_marker": config.close_marker}
    written = {key: _marker_ids(tokenizer, key, text) for key, text in texts.items()}
    pieces = {}
    for key, text in texts.items():
        if config.add_markers and len(written[key]) > 1:
            # Not special: another program that leaves special tokens out still shows where a
            # thought ends.
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=False)])
            added = _marker_ids(tokenizer, key, text)
            pieces[added[0]], written[key] = written[key], added
    open_ids, close_ids = written.values()
    if _stands_in(open_ids, close_ids) or _stands_in(close_ids, open_ids):
        raise ConfigError(f"thought.open_marker {config.open_marker!r} (token ids "
                          f"{list(open_ids)}) and thought.close_marker "
                          f"{config.close_marker!r} ({list(close_ids)}): one stands inside the "
                          "other, so a text with a thought in it "
                          "does not say where the thought ends. Write two markers that share no "
                          "such part.")
    return Markers(open=open_ids, close=close_ids, pieces=pieces)


def _stands_in(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return any(whole[start : start + len(part)] == part
               for start in range(len(whole) - len(part) + 1))


def _marker_ids(tokenizer: PreTrainedTokenizerBase, key: str, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids or tokenizer.unk_token_id in ids:
        raise ConfigError(f"{key}: the tokenizer can not write {text!r} (token ids {list(ids)}, unknown token {tokenizer.unk_token_id}). "
                          f"Write a marker that it knows, such as one of its special tokens {tokenizer.all_special_tokens}.")
    return ids


def marker_notes(tokenizer: PreTrainedTokenizerBase, markers: Markers,
                 config: ThoughtConfig) -> list[str]:
    """What a user has to know of the markers before a run: what was added, or which ordinary token
    can be no target."""
    written = (f"{config.open_marker!r} (token ids {list(markers.open)}) and "
               f"{config.close_marker!r} ({list(markers.close)})")
    if markers.pieces:
        means = "; ".join(f"{token} from {[tokenizer.decode([piece]) for piece in pieces]}"
                          for token, pieces in markers.pieces.items())
        return ["thought.add_markers: added to tokenizer and model, each as the mean of the "
                f"tokens that wrote it: {means}. "
                f"The markers are {written}; they mean nothing to the model before it has seen "
                "thoughts between them (docs/warm_start.md)."]
    if config.add_markers:
        return [f"thought.add_markers: nothing is added, the tokenizer has {written} as single "
                "tokens."]
    if len(markers.open) == 1:
        return []
    first = tokenizer.decode([markers.excluded])
    return [f"WARNING: thought.open_marker {config.open_marker!r} is {len(markers.open)} tokens to "
            "this tokenizer, "
            f"{[tokenizer.decode([token]) for token in markers.open]}. The first one, {first!r} "
            f"(token id {markers.excluded}), "
            "is therefore left out of every target softmax, and no target may be one. Write "
            "thought.add_markers=true, which makes "
            "each marker one new token, or make such a model once: rlp add-markers MODEL --out "
            "FOLDER."]


BFLOAT16_WIDTH = 256
"""Width of a model from which bfloat16 pays on a CPU that has instructions for it. Measured on one core with avx512_bf16 (AMD EPYC,
torch 2.13, 2026-11-21), CPU-seconds in float32 over those in bfloat16 for a Qwen3 of four layers, training | decoding:
width 64: 1.1 | 0.7, 128: 1.5 | 1.0, 256: 2.0 | 1.3, 512: 2.6 | 2.0; a matrix product alone, width 576: 4.8, without the instructions 0.8."""


def choose_dtype(config: Config, device: torch.device, width: int) -> tuple[torch.dtype, str]:
    """The dtype of forward and backward, `engine.dtype` with auto resolved, and why.

    Args:
        width: D of the model.
    """
    if config.engine.dtype != "auto":
        return getattr(torch, config.engine.dtype), "as engine.dtype says"
    if config.engine.zero_stage == 0:
        return torch.float32, "engine.zero_stage 0 has no float32 master weights"
    if device.type == "cuda":
        return torch.bfloat16, "a GPU"
    instructions = bfloat16_instructions()
    if instructions is None:
        return torch.float32, "this CPU has no instructions for bfloat16"
    if width < BFLOAT16_WIDTH:
        return torch.float32, f"the model is {width} wide, and bfloat16 pays from {BFLOAT16_WIDTH} on"
    return torch.bfloat16, f"this CPU has {instructions}; engine.dtype=float32 is two to five times slower"


def read_model_config(config: ModelConfig) -> PretrainedConfig:
    """The architecture, with every dropout off, for the layers that `Policy.train` leaves in training mode."""
    _settle_hub(config.path, "model.path")
    try:
        values, _ = PretrainedConfig.get_config_dict(config.path)
    except Exception as error:  # as above
        raise ConfigError(f"model.path: no model config at {config.path!r}: {_in_one_line(error)}. {_where_models_live}") from error
    if not values:
        raise ConfigError(f"model.path: no config.json in {config.path!r}. {_where_models_live}")
    _refuse_impossible_sizes(config.path, values)
    try:
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=False)
    except Exception as error:  # as above
        raise ConfigError(f"model.path: the config.json of {config.path!r} describes no model: {type(error).__name__}: {_in_one_line(error)}") from error
    for name, value in list(vars(architecture).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(architecture, name, 0.0)
    return architecture


_SIZES = ("vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head", "n_heads", "num_key_value_heads",
          "head_dim", "intermediate_size", "state_size", "max_position_embeddings", "n_positions")
"""Numbers of a config.json of which a model has at least one, by the names of most architectures."""


def _refuse_impossible_sizes(source: str, values: dict) -> None:
    """Refuse what no model has before transformers divides by it."""
    for part in (values, values.get("text_config")):
        sizes = {name: part[name] for name in _SIZES if part.get(name) is not None} if isinstance(part, dict) else {}
        for name, value in sizes.items():
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"model.path: the config.json of {source!r} has {name}={value}; expected at least 1. Write the config of the model.")
        heads, shared = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise ConfigError(f"model.path: the config.json of {source!r} has num_attention_heads={heads} and num_key_value_heads={shared}; expected that each "
                              "of these is shared by as many of those. Write the config of the model.")


def choose_layout(config: Config, architecture: PretrainedConfig) -> tuple[str, str]:
    """`engine.layout` with auto resolved, and why.

    Raises:
        ConfigError: a tree is asked for and the model can not run it.
    """
    if config.engine.layout == "repeated":
        return "repeated", "as engine.layout says"
    obstacle = why_no_tree(architecture, "sdpa" if config.model.attention == "auto" else config.model.attention)
    if obstacle is None:
        return "tree", "each document is run once for all its thoughts"
    if config.engine.layout == "tree":
        raise ConfigError(f"engine.layout: {architecture.model_type} can not run a tree: {obstacle}. Write engine.layout=repeated.")
    return "repeated", obstacle


def _choose_attention(config: ModelConfig, layout: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """The attention to ask transformers for; None lets it take sdpa, or eager where a model has no sdpa."""
    if layout == "tree":
        return register("sdpa")
    if config.attention != "auto":
        return config.attention
    has_flash = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash and device.type == "cuda" and dtype == torch.bfloat16 else None


Whole = Callable[[list[nn.Parameter]], AbstractContextManager]
"""A context in which parameters that are sharded as they are read are whole, to be written."""


def vocabulary_with(markers: Markers, vocabulary: int) -> int:
    """Rows of embedding and head once the added markers are in a model of `vocabulary` rows. Rows
    beyond the tokenizer's tokens, which padded vocabularies have, are used before there are new
    ones."""
    return max(vocabulary, *(token + 1 for token in markers.pieces), 0)


def load_policy(config: Config, tokenizer: PreTrainedTokenizerBase, markers: Markers,
                dtype: torch.dtype, device: torch.device,
                whole: Whole = lambda parameters: nullcontext()) -> Policy:
    """Load or initialize the model, put the added markers in, and check that this program can score
    it.

    Args:
        tokenizer, markers: of `open_tokenizer`.
        whole: for a model that is sharded as it is read.

    Raises:
        ConfigError: no such model, weights missing, a vocabulary larger than the embedding, or logits
            that are not a product of hidden state and head.
    """
    architecture = read_model_config(config.model)
    refuse_other_tokenizer(config, architecture, tokenizer, markers)
    layout, _ = choose_layout(config, architecture)
    lm = _load(config, architecture, _choose_attention(config.model, layout, dtype, device), dtype)
    embed_markers(lm, markers, whole)
    # Some makers freeze a parameter that only training recipes of their own move: without a gradient it stays as it is here too.
    for parameter in lm.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if config.engine.activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(lm, markers, config.engine.logprob_form)


def load_with_markers(config: Config, tokenizer: PreTrainedTokenizerBase,
                      markers: Markers) -> PreTrainedModel:
    """The pretrained model as transformers loads it, in its own dtype and with its config
    untouched, with the added markers in it."""
    architecture = AutoConfig.from_pretrained(config.model.path, trust_remote_code=False)
    refuse_other_tokenizer(config, architecture, tokenizer, markers)
    lm = _load(config, architecture, None, "auto")
    embed_markers(lm, markers, lambda parameters: nullcontext())
    return lm


def refuse_other_tokenizer(config: Config, architecture: PretrainedConfig,
                           tokenizer: PreTrainedTokenizerBase, markers: Markers) -> None:
    """Refuse a tokenizer with more tokens than the model has rows; added markers get rows of their
    own."""
    vocabulary = architecture.get_text_config().vocab_size
    num_tokens = max(tokenizer.get_vocab().values()) + 1 - len(markers.pieces)
    if num_tokens > vocabulary:
        raise ConfigError(f"model.tokenizer: {num_tokens} tokens, but the embedding of "
                          f"{config.model.path} has {vocabulary} rows. "
                          "Write the tokenizer that belongs to the model, or resize the model's "
                          "embedding first.")


@torch.no_grad()
def embed_markers(lm: PreTrainedModel, markers: Markers,
                  whole: Whole) -> None:
    """Give each added marker its row in the embedding, the head where it is not tied, and the
    head's bias where there is one: the mean, taken in float32, of the rows of the tokens that wrote
    its text before. All other rows stay.

    Args:
        whole: of `load_policy`.
    """
    if not markers.pieces:
        return
    text = lm.config.get_text_config()
    if (rows := vocabulary_with(markers, text.vocab_size)) > text.vocab_size:
        lm.resize_token_embeddings(rows, mean_resizing=False)
    tables = [lm.get_input_embeddings().weight]
    head = lm.get_output_embeddings()
    tables += [table for table in (head.weight, getattr(head, "bias", None)) if table is not None
               and table is not tables[0]]
    with whole(tables):
        for table in tables:
            for token, pieces in markers.pieces.items():
                table[token] = table[list(pieces)].float().mean(dim=0).to(table.dtype)


def _load(config: Config, architecture: PretrainedConfig, attention: str | None,
          dtype: torch.dtype | str) -> PreTrainedModel:
    """`_build`, with what transformers raises turned into a ConfigError."""
    try:
        return _build(config, architecture, attention, dtype)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError, LookupError, AttributeError, TypeError, RuntimeError,
            ArithmeticError, SafetensorError) as error:
        raise ConfigError(f"model.path: {config.model.path!r} could not be loaded: "
                          f"{first_line(error)}. {_where_models_live}") from error


def _build(config: Config, architecture: PretrainedConfig, attention: str | None,
           dtype: torch.dtype | str) -> PreTrainedModel:
    if config.model.init == "random":
        torch.manual_seed(config.run.seed)
        return AutoModelForCausalLM.from_config(architecture, attn_implementation=attention, dtype=dtype, trust_remote_code=False)
    _refuse_pickles(config.model.path)
    lm, loading = AutoModelForCausalLM.from_pretrained(
        config.model.path, config=architecture, attn_implementation=attention, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(f"model.path: {config.model.path!r} lacks {len(missing)} weights that the architecture has, such as {missing[0]}. "
                          "Write the folder of a complete checkpoint.")
    return lm


def _refuse_pickles(source: str) -> None:
    """An index of safetensors may name files of another kind, which transformers would unpickle."""
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    if index is not None:
        files = json.loads(Path(index).read_bytes())["weight_map"].values()
        odd = [name for name in files if not (isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name)]
        if odd:
            raise ValueError(f"{index} names {odd[0]!r}; expected safetensors files in the same folder")


def quiet_transformers() -> None:
    """Keep transformers from writing to the console."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

"""Every knob of a run: what it means, its unit, where its value comes from, and what it may be.

A config is one YAML file plus dotted overrides (`thought.group_size=8`), read strictly: an
unknown key is refused with the nearest known one, an impossible value is refused by the section
that defines it. "Paper" is arXiv 2510.01265, version 2. Nothing here imports torch.
"""

import dataclasses
import datetime
import difflib
import io
import math
import os
import re
import string
import typing
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rlp.writing import SCRIPTS


class ConfigError(ValueError):
    """A config that cannot be run. The message names the field, its value and the rule."""


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Refuse `value` of the config key `key` unless `holds`, saying the rule."""
    if not holds:
        raise ConfigError(f"{key} {rule}, got {value!r}.")


def require_at_least(name: str, section: object, **least: float) -> None:
    """Refuse a section in which one of these numbers is smaller than it may be."""
    for field_name, bound in least.items():
        value = getattr(section, field_name)
        require(value >= bound, f"{name}.{field_name}", value, f"must be at least {bound}")


def require_one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices."""
    require(value in choices, key, value, f"must be one of {', '.join(choices)}")


def require_script(key: str, value: str) -> None:
    """Refuse the name of a script that does not exist (`rlp.writing.SCRIPTS`)."""
    near = difflib.get_close_matches(value.lower(), SCRIPTS, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    require(value in SCRIPTS, key, value, f"must be a script{meant}, one of {', '.join(SCRIPTS)}")


def parse_moment(text: str, start: float) -> float:
    """Unix time, in seconds, that a text means.

    Args:
        text: seconds or HH:MM:SS after the start, or an ISO date and time, local where it names no
            offset.
        start: Unix time.

    Raises:
        ValueError: it is none of these.
    """
    if (seconds := parse_duration(text)) is not None:
        return start + seconds

    if re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d", text):
        return datetime.datetime.fromisoformat(text).timestamp()

    raise ValueError(f"{text!r} is no time")


def parse_duration(text: str) -> float | None:
    """Seconds that a text means, which is seconds or HH:MM:SS; None where it is neither."""
    if re.fullmatch(r"\d+", text):
        return float(text)

    if match := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text):
        hours, minutes, seconds = map(int, match.groups())
        return 3600.0 * hours + 60 * minutes + seconds

    return None


def is_moment(text: str) -> bool:
    """Whether `parse_moment` reads it."""
    try:
        return math.isfinite(parse_moment(text, 0.0))
    except ValueError:
        return False


def require_part(key: str, name: str, ours: tuple[str, ...]) -> None:
    """Refuse the name of a part that is neither one of ours nor `package.module:name`."""
    require(
        name in ours or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_<][\w.<>]*", name) is not None,
        key,
        name,
        f"must be one of {', '.join(ours)}, or one of yours as package.module:name",
    )


@dataclass
class RunConfig:
    """Where a run lives, and what makes it repeatable."""

    dir: str = "???"
    """The run folder. It is created; one that exists is never written over."""
    seed: int = 0
    """Seeds the order of documents, the positions, the thoughts and a random initialization."""
    arm: str = ""
    """Name of the arm that a comparison (`rlp report`) shows this run under; runs that differ in
    their seed share it. By default the name of the run folder without the seed at its end."""
    resume: str = "never"
    """`never`: the run folder must not exist. `auto`, for a job that is started again and again:
    make the folder, or continue it from its newest good checkpoint, or, where the run was killed
    before its first one, begin again in it.
    A PATH: start this new run folder from that checkpoint (`.../checkpoints/step_40`)."""
    watchdog_s: float = 1800.0
    """Seconds without any progress (a token, a micro-batch, a phase) after which every rank shows
    its stacks and the run ends with exit code 70. More than the longest thing done in one piece:
    loading or saving the model. 0: never."""

    def __post_init__(self) -> None:
        require(
            self.dir.isprintable(), "run.dir", self.dir, "must be a path without control characters"
        )
        require(
            0 <= self.seed < 2**63, "run.seed", self.seed, "must be at least 0 and below 2 ** 63"
        )
        require(
            self.watchdog_s >= 0,
            "run.watchdog_s",
            self.watchdog_s,
            "must be at least 0 (0: no watchdog)",
        )
        require(
            self.resume != "",
            "run.resume",
            self.resume,
            "must be never, auto or the path of a checkpoint",
        )


@dataclass
class ModelConfig:
    """The causal language model that thinks and predicts (the policy, pi_theta)."""

    path: str = "???"
    """A Hugging Face folder or Hub name. With `init: random`, a folder or file that holds a config
    only."""
    tokenizer: str | None = None
    """Folder or Hub name of the tokenizer; by default that of `path`."""
    init: str = "pretrained"
    """`pretrained` reads weights; `random` draws them from the model's own initializer with
    `run.seed`."""
    attention: str = "auto"
    """Attention implementation of transformers: auto, sdpa, eager, flash_attention_2. `auto` is
    flash_attention_2 on a GPU where it is installed and the compute dtype is bfloat16, else sdpa
    (else eager, where the architecture has no sdpa). The layout `tree` always runs on sdpa."""

    def __post_init__(self) -> None:
        require_one_of("model.init", self.init, ("pretrained", "random"))
        require_one_of(
            "model.attention", self.attention, ("auto", "sdpa", "eager", "flash_attention_2")
        )


@dataclass
class DataConfig:
    """Where documents come from and how one row becomes a document."""

    train: list[str] = field(default_factory=list)
    """Files, globs (`corpus/*.jsonl`) or a Hub data set (`hub:OWNER/NAME` or
    `hub:OWNER/NAME@CONFIG`)."""
    weights: list[float] = field(default_factory=list)
    """One for each entry of `train`: the share of documents drawn from it, each entry in an order
    and epochs of its own. Empty: all rows of all entries are one corpus."""
    held_out: list[str] = field(default_factory=list)
    """The same, for the held-out panel. Empty: no evaluation."""
    format: str = "auto"
    """auto (by file ending), jsonl, parquet, csv, tsv (both with a header that names the fields, in
    UTF-8, all fields text) or text (one document a line). gz and zst are unpacked, once, and
    Parquet is written as Arrow, below `HF_HOME`; the others are read where they stand."""
    delimiter: str | None = None
    """The character between the fields of csv and tsv files, such as ";"; by default a comma and a
    tab."""
    split: str = "train"
    """Split of a Hub data set."""
    held_out_split: str = "test"
    """Split of a Hub data set for the held-out panel."""
    template: str = "{text}"
    """How a row becomes text, naming its fields: `{text}`, `{question}\\n{answer}`."""
    tokens_field: str | None = None
    """Field of the rows of `train` that holds token ids, read in place of text (documents with
    thoughts made by `rlp splice`)."""
    loss_field: str | None = None
    """Field of those rows that holds the tokens which the LM loss is taken on, as spans `[[start,
    stop], ...]` of `tokens_field`, stop not included (`loss_spans` of `rlp splice`: thoughts and
    their targets). Only they count, in its divisor and in the ledger too; a row without one is
    passed over. None: every token."""
    ledger: str | None = None
    """The ledger.json of what made the data. Its tokens, FLOPs and seconds are counted as this
    run's from the start."""
    append_eos: bool = False
    """End every document with the tokenizer's end-of-sequence token."""
    max_document_tokens: int = 2048
    """Longer documents are cut to their first tokens. Paper, section 9: sequence length 8192 for
    the 12B, 2048 ours."""
    shuffle: bool = True
    """Read each epoch in a seeded order; False reads the files as they are."""
    max_bad_fraction: float = 0.01
    """The run stops when more than this fraction of the documents read is bad (unreadable row,
    missing field, empty or too short for a position); up to it they are skipped and counted."""

    def __post_init__(self) -> None:
        require(
            len(self.weights) in (0, len(self.train)),
            "data.weights",
            self.weights,
            f"needs one weight for each of the {len(self.train)} entries of data.train, or none",
        )
        require(
            all(0 < weight < math.inf for weight in self.weights),
            "data.weights",
            self.weights,
            "must be finite and above 0; leave out an entry that is not to be read",
        )
        require(
            self.loss_field is None or self.tokens_field is not None,
            "data.loss_field",
            self.loss_field,
            "holds spans of the tokens of data.tokens_field; write that too",
        )
        require_one_of(
            "data.format", self.format, ("auto", "jsonl", "parquet", "csv", "tsv", "text")
        )
        require(
            self.delimiter is None or _is_delimiter(self.delimiter),
            "data.delimiter",
            self.delimiter,
            "must be one ASCII character, and no quote or line end",
        )
        require(
            self.max_document_tokens >= 2,
            "data.max_document_tokens",
            self.max_document_tokens,
            "must be at least 2 (a prefix and a target)",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            "data.max_bad_fraction",
            self.max_bad_fraction,
            "is a fraction from 0 to 1",
        )
        require(
            _names_fields(self.template),
            "data.template",
            self.template,
            "must name at least one field of a row in braces, and nothing else in them, as in"
            " {text}; a brace of the text is written twice",
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _is_delimiter(text: str) -> bool:
    return len(text) == 1 and text.isascii() and text not in '"\r\n'


def _names_fields(template: str) -> bool:
    """Whether a template has fields in braces, and nothing but their names there."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return False

    fields = [part for part in parts if part[1] is not None]
    for _, name, spec, conversion in fields:
        if not name or spec or conversion is not None:
            return False
    return len(fields) > 0


@dataclass
class PositionConfig:
    """Which tokens of a document are predicted after a thought (the index t)."""

    per_document: int | str = 1
    """K positions per document, or `all`. Paper, section 3: one random token per document."""
    selector: str = "uniform"
    """uniform at random (paper); `marker`: right after `marker`; `entropy` or `surprisal`: the K
    positions with the largest no-think entropy, or the largest -log p of the target, under the
    policy; `package.module:name`: a selector of yours (docs/extending.md)."""
    marker: str | None = None
    """Text whose end is a position, for the selector `marker`, or one of yours."""
    min_prefix_tokens: int = 1
    """Tokens of context that a position must have before it."""

    def __post_init__(self) -> None:
        require(
            self.per_document == "all" or _is_count(self.per_document),
            "position.per_document",
            self.per_document,
            "must be a whole number of at least 1, or all",
        )
        require_part(
            "position.selector", self.selector, ("uniform", "marker", "entropy", "surprisal")
        )
        require(
            (self.selector == "marker") == bool(self.marker) or ":" in self.selector,
            "position.marker",
            self.marker,
            f"goes with position.selector: marker and only with it (selector is {self.selector})",
        )
        require(
            self.min_prefix_tokens >= 1,
            "position.min_prefix_tokens",
            self.min_prefix_tokens,
            "must be at least 1 (the first token has no context)",
        )


@dataclass
class ThoughtConfig:
    """The thought c_t, sampled between an open and a close marker after the prefix."""

    group_size: int = 16
    """G thoughts per position. "Performing 16 rollouts" (paper, section 9)."""
    max_thought_tokens: int = 2048
    """Sampled tokens at most, the close marker included. "Completion length" 2048 (paper, section
    9)."""
    temperature: float = 0.7
    """Thought tokens are sampled, and their log-probabilities taken, at this temperature (paper,
    section 9: 0.7)."""
    open_marker: str = "<think>"
    """Text before a thought; one or several tokens."""
    close_marker: str = "</think>"
    """Text after a thought; sampled and trained. A thought that reaches the budget gets it by
    force, without gradient."""
    add_markers: bool = False
    """Make a marker that the tokenizer writes with several tokens one new token of tokenizer and
    model. Its rows of embedding and head begin as the mean of those tokens'; the export holds both
    markers and needs no key. The two mean nothing to the model at first: docs/warm_start.md. False:
    such a marker stays several tokens, and the first one of the open marker, often an ordinary one
    such as `<`, is no target anywhere."""
    instruction_file: str | None = None
    """Text put before the prefix when thinking, never in the no-think context. None: no
    instruction."""
    top_p: float = 1.0
    """Here to be refused: a truncated distribution is not the policy whose log-probability is
    trained."""
    top_k: int = 0
    """Here to be refused, as top_p."""

    def __post_init__(self) -> None:
        require(
            self.group_size >= 2,
            "thought.group_size",
            self.group_size,
            "must be at least 2 (eq. 7 divides by G - 1)",
        )
        require_at_least("thought", self, max_thought_tokens=1)
        require(
            self.temperature > 0,
            "thought.temperature",
            self.temperature,
            "must be above 0 (a greedy thought has no log-probability to train)",
        )

        for name in ("open_marker", "close_marker"):
            marker = getattr(self, name)
            require(marker != "", f"thought.{name}", marker, "must not be empty")
        require(
            self.open_marker != self.close_marker,
            "thought.close_marker",
            self.close_marker,
            "must differ from thought.open_marker, or no thought would end",
        )

        same_policy = (
            "would sample from another distribution than the policy whose log-probability is"
            " trained, so the ratio of eq. 8 would not be 1 on-policy; write"
        )
        require(self.top_p == 1.0, "thought.top_p", self.top_p, f"{same_policy} thought.top_p=1.0")
        require(self.top_k == 0, "thought.top_k", self.top_k, f"{same_policy} thought.top_k=0")


VLLM_LEAST_TEMPERATURE = 0.01
"""vLLM takes it in the place of a lower one."""


@dataclass
class SamplingConfig:
    """How thoughts are sampled on the machine (docs/sampling.md). Changes memory and speed, never
    the policy that they are sampled from."""

    engine: str = "auto"
    """What samples: `native`, the very module that is trained, or `vllm`, a copy of its weights in
    vLLM, whose thoughts are others of the same distribution. auto: native."""
    slots: int = 128
    """Thoughts that grow side by side on one rank; one that ends leaves its slot to the next. Four
    at least are run, whatever is asked for."""
    graph: str = "auto"
    """Replay the decoding of a token as one CUDA graph: on, off, or auto: where it can be."""
    vllm_memory_frac: float = 0.3
    """Fraction of a device's memory that vLLM's keys and values may take while it samples; never
    more than `slots` of the longest thoughts need. Its copy of the weights comes on top."""

    def __post_init__(self) -> None:
        require_one_of("sampling.engine", self.engine, ("auto", "native", "vllm"))
        # YAML reads the words on and off as true and false.
        self.graph = {"True": "on", "False": "off"}.get(self.graph, self.graph)
        require_one_of("sampling.graph", self.graph, ("auto", "on", "off"))
        require_at_least("sampling", self, slots=1)
        require(
            0 < self.vllm_memory_frac <= 1,
            "sampling.vllm_memory_frac",
            self.vllm_memory_frac,
            "is a fraction above 0 and up to 1",
        )


@dataclass
class TargetConfig:
    """What is scored after the thought (x_t)."""

    horizon: int = 1
    """H target tokens; the log-evidence is their mean log-probability. Paper: the next token."""
    temperature: float = 1.0
    """Targets are scored at temperature 1; anything else makes Proposition 1 false, and is for
    ablations."""

    def __post_init__(self) -> None:
        require_at_least("target", self, horizon=1)
        require(self.temperature > 0, "target.temperature", self.temperature, "must be above 0")


@dataclass
class RewardConfig:
    """What a thought is rewarded for. Another kind, and a placebo, is a control that RLP is
    compared with."""

    kind: str = "information_gain"
    """`information_gain`: eq. 5. `greedy_match`: 1 where every target is the most probable token
    after the thought, else 0. `prefix_match`: the policy goes on after the thought with a
    prediction of up to `target.horizon` tokens, and it is 1 where the document goes on with them,
    else 0; thought and prediction are trained (RPT, arXiv 2506.08007). `exact_match`: likewise, 1
    where all `target.horizon` tokens are right (RLVR). `package.module:name`: a reward of yours
    (docs/extending.md)."""
    placebo: str = "none"
    """`shuffled_reward`: each position's thoughts get the rewards of the position before it in the
    step, whatever the micro-batches and ranks. `foreign_thought`: the reward of each thought is
    measured with a thought of that position in its place. `other_thought`: each thought is written
    over with the words of a thought of that position, as many as it has itself, and is rewarded and
    trained as if it were its own. None says anything about the thought in its place."""
    script: str | None = None
    """The script that thoughts are to be written in, such as `latin`, `cyrillic`, `han`, or
    `japanese` (Han, Hiragana and Katakana): its share of their letters is logged as
    `thought/target_script_frac`. Digits, signs and spaces are neutral. Needed where
    `language_weight` is above 0."""
    language_weight: float = 0.0
    """lambda of r + lambda * share: added to the reward of a thought is lambda times the share of
    its letters that are of `script`, 1 where it has none; the answer is not looked at. In the unit
    of the reward: nats, or 1 for a right answer. 0: nothing is added. DeepSeek-R1 (arXiv
    2501.12948) adds such a share with weight 1 to rewards of 0 and 1."""

    def __post_init__(self) -> None:
        require_at_least("reward", self, language_weight=0)
        if self.script is not None:
            require_script("reward.script", self.script)
        require(
            self.language_weight == 0 or self.script is not None,
            "reward.script",
            self.script,
            "must name the script that reward.language_weight pays for, as in reward.script=latin",
        )
        require_part(
            "reward.kind",
            self.kind,
            ("information_gain", "greedy_match", "prefix_match", "exact_match"),
        )
        require_one_of(
            "reward.placebo",
            self.placebo,
            ("none", "shuffled_reward", "foreign_thought", "other_thought"),
        )

    @property
    def predicts(self) -> bool:
        """Whether one of ours makes the policy go on with a prediction after the thought."""
        return self.kind in ("prefix_match", "exact_match")


@dataclass
class ObjectiveConfig:
    """Weights of the loss. With `policy_weight`, `predictor_weight` and `kl_weight` 0 no thought is
    sampled: that is continued pretraining (CPT)."""

    kind: str = "rlp"
    """`rlp`: the sum of the terms below, each with its weight. `package.module:name`: a loss of
    yours (docs/extending.md), which is given these weights and uses those it wants."""
    policy_weight: float = 1.0
    """Weight of the clipped surrogate, eq. 8."""
    lm_weight: float = 0.1
    """Weight of the next-token loss on the documents. 0 in the paper; 0.1 is ours, to be settled by
    experiment."""
    predictor_weight: float = 0.0
    """Weight of -log p(x_t | x_<t, c), the gradient through the predictor that the paper drops."""
    kl_weight: float = 0.0
    """beta: KL to the starting checkpoint on thought tokens. 0 in the paper; its ablation finds no
    help."""
    clip_low: float = 0.2
    """epsilon_l of eq. 8. The paper gives no value; 0.2 is PPO's."""
    clip_high: float = 0.2
    """epsilon_h of eq. 8. The paper gives no value; 0.2 is PPO's."""
    ratio_cap: float = 2.0
    """c, for thoughts that another program has sampled (`sampling.engine: vllm`): where A < 0 the
    gain of a token is max(min(rho A, clip(rho) A), c A), as eq. 8 has no bound there and an error
    of the sampler would count by its factor. Dual-clip PPO (arXiv 1912.09729, eq. 5), which has 3;
    2 is ours. With sampling.engine: native rho is 1 on-policy, and eq. 8 stands as it is."""

    def __post_init__(self) -> None:
        require_part("objective.kind", self.kind, ("rlp",))
        weights = ("policy_weight", "lm_weight", "predictor_weight", "kl_weight")
        for name in weights:
            require(
                getattr(self, name) >= 0,
                f"objective.{name}",
                getattr(self, name),
                "must be at least 0",
            )
        require(
            any(getattr(self, name) > 0 for name in weights),
            "objective",
            [getattr(self, name) for name in weights],
            f"needs a weight above 0 among {', '.join(weights)}",
        )
        require(
            0 <= self.clip_low < 1,
            "objective.clip_low",
            self.clip_low,
            "must be at least 0 and below 1 (the lower bound is 1 - clip_low)",
        )
        require(self.clip_high >= 0, "objective.clip_high", self.clip_high, "must be at least 0")
        require(
            self.ratio_cap > 1,
            "objective.ratio_cap",
            self.ratio_cap,
            "must be above 1 (a ratio of 1 is that of the policy itself)",
        )

    @property
    def thinks(self) -> bool:
        """Whether any term of the loss needs thoughts."""
        return self.policy_weight > 0 or self.predictor_weight > 0 or self.kl_weight > 0


@dataclass
class BaselineConfig:
    """The no-think prediction S_ema that the reward is measured against (eq. 4).

    It is one number for all thoughts of a position, so it cancels in eq. 7: it changes what is
    reported, never the update. Hence it may be scored on some steps only.
    """

    kind: str = "ema"
    """ema (paper), frozen (the starting checkpoint), self (the policy, no thought), none (0), or
    `package.module:name`: a baseline of yours (docs/extending.md)."""
    ema_decay: float = 0.999
    """Weight of the old average per optimizer step (the paper's tau, 0.999)."""
    every_n_steps: int = 1
    """Score the baseline on every n-th step; between, no gain is reported, and of an
    information-gain reward only what does not depend on the baseline: its spread within groups, and
    how it goes with length."""

    def __post_init__(self) -> None:
        require_part("baseline.kind", self.kind, ("ema", "frozen", "self", "none"))
        require(
            0 <= self.ema_decay < 1,
            "baseline.ema_decay",
            self.ema_decay,
            "must be at least 0 and below 1",
        )
        require(
            self.every_n_steps >= 1,
            "baseline.every_n_steps",
            self.every_n_steps,
            "must be at least 1",
        )


@dataclass
class OptimConfig:
    """AdamW."""

    batch_size: int = 512
    """B documents per optimizer step, over all ranks (paper, section 9: 512)."""
    micro_batch_size: int = 1
    """Documents per forward on one rank; changes memory and speed, never the gradient."""
    thoughts_per_forward: int | None = None
    """Thoughts of each group in one forward, for groups that do not fit in memory; None: whole
    groups. Groups in slices are scored once more, ahead; the gradient is the same."""
    tokens_per_micro_batch: int | None = None
    """Token positions of a forward on one rank at most, padding included, and rows of its LM head:
    documents are put together by their real lengths, when their thoughts are known, whole with all
    their groups, or in slices of groups where one document is too much. Changes memory and speed,
    never the gradient. None: `micro_batch_size` documents, whatever their lengths."""
    updates_per_rollout: int = 1
    """Optimizer updates with the same thoughts. 1 is on-policy: the ratio is 1 and the clip inert.
    With more, rewards and behavior log-probabilities are those of the rollout, and the clip is
    live. The paper's Algorithm 1 has one."""
    learning_rate: float = 1e-6
    """"A constant learning rate of 1e-6" (paper, section 9)."""
    schedule: str = "constant"
    """constant (paper), cosine or linear over the budget, times the warm-up."""
    warmup_steps: int = 0
    """Linear warm-up from 0, in optimizer steps."""
    final_fraction: float = 0.0
    """Learning rate at the end of a cosine or linear schedule, as a fraction of its peak."""
    beta1: float = 0.9
    """Decay of the mean of gradients. The paper gives no value."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients. The paper gives no value."""
    epsilon: float = 1e-8
    """Added to the root of the mean of squared gradients. The paper gives no value."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; the paper gives no value."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip. The paper gives no value; 1.0 is ours."""
    spike_factor: float = 0.0
    """Refuse an update whose gradient norm, before clipping, is above this many times the median of
    the last `spike_window` applied ones. 0 (ours, as the paper is silent): no update is refused for
    its size."""
    spike_window: int = 50
    """Applied updates that the median is taken of; before there are as many, none is refused."""

    def __post_init__(self) -> None:
        require_at_least(
            "optim",
            self,
            batch_size=1,
            micro_batch_size=1,
            updates_per_rollout=1,
            warmup_steps=0,
            weight_decay=0,
            grad_clip=0,
            spike_window=1,
        )
        require(
            self.thoughts_per_forward is None or self.thoughts_per_forward >= 1,
            "optim.thoughts_per_forward",
            self.thoughts_per_forward,
            "must be at least 1, or null for whole groups",
        )
        require(
            self.tokens_per_micro_batch is None or self.tokens_per_micro_batch >= 1,
            "optim.tokens_per_micro_batch",
            self.tokens_per_micro_batch,
            "must be at least 1, or null for optim.micro_batch_size documents",
        )
        require(
            self.tokens_per_micro_batch is None or self.thoughts_per_forward is None,
            "optim.thoughts_per_forward",
            self.thoughts_per_forward,
            "must be null beside optim.tokens_per_micro_batch, which cuts groups by itself",
        )

        require(
            self.learning_rate >= 0 and math.isfinite(self.learning_rate),
            "optim.learning_rate",
            self.learning_rate,
            "must be finite and at least 0",
        )
        require_one_of("optim.schedule", self.schedule, ("constant", "cosine", "linear"))
        require(
            0 <= self.final_fraction <= 1,
            "optim.final_fraction",
            self.final_fraction,
            "is a fraction from 0 to 1",
        )

        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            require(0 <= beta < 1, f"optim.{name}", beta, "must be at least 0 and below 1")
        require(self.epsilon > 0, "optim.epsilon", self.epsilon, "must be above 0")
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            "optim.spike_factor",
            self.spike_factor,
            "must be above 1, or 0 to refuse no update for its size",
        )


@dataclass
class EngineConfig:
    """How the model is trained on the machine: DeepSpeed ZeRO and precision."""

    zero_stage: int = 1
    """0 (no sharding, float32 only), 1 (optimizer), 2 (and gradients), 3 (and parameters)."""
    dtype: str = "auto"
    """Compute dtype: float32, bfloat16 (with float32 master weights), or auto: bfloat16 on a GPU,
    and on a CPU with instructions for it (avx512_bf16, AMX) where the model is wide enough to gain
    (`rlp/model/loading.py`), else float32. A run goes on in the dtype that it began in, whatever
    machine it comes to. The choice and its reason are said when the run starts."""
    layout: str = "auto"
    """How thoughts and documents become rows: `repeated` (each thought with its own copy of the
    prefix; any causal LM), `tree` (each document once, shared by its thoughts; attention-only
    models), or auto: tree where the model can."""
    logprob_form: str = "auto"
    """How log-probabilities are computed from hidden states (`kernels/README.md`): plain, chunked,
    triton, folded, or auto: by size and device, from what was measured. The choice is said when
    the run starts."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one more forward."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (DeepSpeed's CPU offload; stages 1 to 3)."""
    generation: str = "gathered"
    """Sampling under stage 3: `gathered` holds all weights on each rank while it samples; `synced`
    gathers layer by layer and keeps the ranks in step, slower and with less memory."""
    networks: list[str] = field(default_factory=list)
    """Copies of the policy that a baseline or a loss of yours needs, `ema` or `start`: filled in
    when the run starts, so that the run folder says what was held in memory."""

    def __post_init__(self) -> None:
        for network in self.networks:
            require_one_of("engine.networks", network, ("ema", "start"))
        require(
            self.zero_stage in (0, 1, 2, 3),
            "engine.zero_stage",
            self.zero_stage,
            "must be 0, 1, 2 or 3",
        )
        require_one_of("engine.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        require_one_of(
            "engine.logprob_form",
            self.logprob_form,
            ("auto", "plain", "chunked", "triton", "folded"),
        )
        require_one_of("engine.layout", self.layout, ("auto", "repeated", "tree"))
        require_one_of("engine.generation", self.generation, ("gathered", "synced"))

        require(
            not (self.zero_stage == 0 and self.dtype == "bfloat16"),
            "engine.zero_stage",
            self.zero_stage,
            "must be at least 1 with engine.dtype bfloat16 (stage 0 has no float32 master weights,"
            " and at small learning rates bfloat16 weights do not move); write engine.zero_stage=1",
        )
        require(
            not (self.zero_stage == 0 and self.offload_optimizer),
            "engine.offload_optimizer",
            True,
            "needs engine.zero_stage of at least 1",
        )


@dataclass
class BudgetConfig:
    """When the run ends: at the first limit reached, of tokens, FLOPs or seconds at the step that
    comes nearest to it. At least one is needed."""

    steps: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """Document tokens read (input tokens), over all ranks."""
    flops: float | None = None
    """FLOPs spent by the ledger's own count, over all ranks."""
    paper_flops: float | None = None
    """The paper's T_flop, in tokens: each thought's whole budget, and the input tokens."""
    seconds: float | None = None
    """Seconds of the ledger's phases, each of its slowest rank. A resumed run does not stop at the
    same step to the digit."""

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            require(limit is None or limit > 0, f"budget.{name}", limit, "must be above 0")


@dataclass
class MatchConfig:
    """The run that this one is matched with; `rlp match` writes this section and the budget that
    goes with it."""

    ledger: str | None = None
    """The ledger.json of that run. Empty: no match."""
    by: str = "flops"
    """What the two spend alike, to 1 %: tokens, flops, paper_flops or seconds."""

    def __post_init__(self) -> None:
        require_one_of("match.by", self.by, ("tokens", "flops", "paper_flops", "seconds"))


@dataclass
class EvaluationConfig:
    """The held-out panel, which is all that "evaluation" means here: positions of `data.held_out`
    that stay the same, scored with and without a thought, before, during and after the run.

    Benchmarks are something else: `rlp eval` puts them to a model that is finished.
    """

    panel_positions: int = 256
    """Positions in the panel."""
    selector: str | None = None
    """Where the panel thinks: `uniform` at random, or `marker`: right after `evaluation.marker`.
    None: where the run may, by `position.selector`; of those that the policy chooses (`entropy`,
    `surprisal`, one of yours) any may be drawn, or the panel would be another one each time."""
    marker: str | None = None
    """Text whose end is a position, for `evaluation.selector: marker`."""
    per_document: int | str | None = None
    """Positions of each document of the panel, or `all`. None: as `position.per_document`."""
    thoughts_per_position: int = 4
    """Thoughts sampled for each."""
    cold_temperature: float | None = None
    """Think on the panel at this temperature too, such as 0.3, each time that it is scored: what
    careful sampling gains without any training is no merit of the training. None: at
    `thought.temperature` alone, as a second temperature doubles what an evaluation costs."""
    every_n_steps: int = 0
    """Score the panel during the run every n steps; 0: before and after only."""
    batch_size: int = 32
    """Documents of the panel per forward on one rank."""

    def __post_init__(self) -> None:
        require_at_least(
            "evaluation",
            self,
            panel_positions=1,
            thoughts_per_position=1,
            every_n_steps=0,
            batch_size=1,
        )
        require(
            self.cold_temperature is None or self.cold_temperature > 0,
            "evaluation.cold_temperature",
            self.cold_temperature,
            "must be above 0, or null for none",
        )
        require(
            self.selector in (None, "uniform", "marker"),
            "evaluation.selector",
            self.selector,
            "must be uniform or marker, or null for the positions of the run",
        )
        require(
            (self.selector == "marker") == bool(self.marker),
            "evaluation.marker",
            self.marker,
            f"goes with evaluation.selector: marker and only with it (selector is {self.selector})",
        )
        require(
            self.per_document in (None, "all") or _is_count(self.per_document),
            "evaluation.per_document",
            self.per_document,
            "must be a whole number of at least 1, or all, or null for position.per_document",
        )


@dataclass
class CheckpointConfig:
    """What is kept to resume from."""

    every_n_steps: int = 100
    """Save a checkpoint every n steps; 0: at the end only."""
    keep: int = 2
    """Newest checkpoints kept."""
    save_by: str | None = None
    """When the run gives up its step, saves and ends with exit code 75: seconds (`84600`) or
    HH:MM:SS (`"23:30:00"`) after its start, or a time (`2026-01-31T18:30`, local where it names no
    offset). Leave the time of a save before the end of the job. None: never."""

    def __post_init__(self) -> None:
        require_at_least("checkpoint", self, every_n_steps=0, keep=1)
        require(
            self.save_by is None or is_moment(self.save_by),
            "checkpoint.save_by",
            self.save_by,
            "must be seconds (84600) or HH:MM:SS after the start, or a time such as"
            " 2026-01-31T18:30",
        )


@dataclass
class LoggingConfig:
    """What is told while the run goes on. `metrics.jsonl` always gets every step."""

    every_n_steps: int = 10
    """A console line and a sample of thoughts every n steps."""
    thoughts: int = 16
    """Thoughts written to `thoughts.jsonl` each time: the most and least helpful ones."""
    journal: bool = True
    """Write `journal.jsonl`: checksums of what each step read and thought, to compare two runs
    (`rlp/measure/journal.py`)."""
    digest_every_n_steps: int = 100
    """In it, a checksum of master weights, moments and EMA every n steps; 0: none."""
    wandb: str = "disabled"
    """Weights & Biases: disabled, offline or online."""
    wandb_project: str = "rlp"
    """Its project."""

    def __post_init__(self) -> None:
        require_at_least("logging", self, every_n_steps=1, digest_every_n_steps=0, thoughts=0)
        require_one_of("logging.wandb", self.wandb, ("disabled", "offline", "online"))


MAX_COUNT = 2**31
"""Of documents, positions, thoughts, tokens of a thought, steps between two events."""

NO_COUNTS = {"run.seed", "budget.steps", "budget.tokens"}
"""Whole numbers that nothing is made of so many."""


@dataclass
class Config:
    """A run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    position: PositionConfig = field(default_factory=PositionConfig)
    thought: ThoughtConfig = field(default_factory=ThoughtConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            for name, value in vars(getattr(self, section.name)).items():
                _refuse_beyond_machines(f"{section.name}.{name}", value)

        require(
            len(self.data.train) > 0,
            "data.train",
            self.data.train,
            "must name at least one file, glob or hub:OWNER/NAME",
        )
        self._refuse_budget()

        alone = self.optim.batch_size == 1 and self.position.per_document == 1
        require(
            self.reward.placebo == "none" or not alone,
            "reward.placebo",
            self.reward.placebo,
            "exchanges the positions of a step, which has a single one here; write"
            " optim.batch_size=2 or more",
        )

        for key, temperature in (
            ("thought.temperature", self.thought.temperature),
            ("evaluation.cold_temperature", self.evaluation.cold_temperature),
        ):
            self._refuse_below_vllm(key, temperature)

        shortest = self.position.min_prefix_tokens + self.target.horizon
        require(
            shortest <= self.data.max_document_tokens,
            "data.max_document_tokens",
            self.data.max_document_tokens,
            f"must hold position.min_prefix_tokens + target.horizon = {shortest} tokens",
        )

    def _refuse_below_vllm(self, key: str, temperature: float | None) -> None:
        reached = temperature is None or temperature >= VLLM_LEAST_TEMPERATURE
        require(
            self.sampling.engine != "vllm" or reached,
            key,
            temperature,
            f"must be at least {VLLM_LEAST_TEMPERATURE} with sampling.engine: vllm, which samples"
            " at no lower one; write sampling.engine=native",
        )

    def _refuse_budget(self) -> None:
        limits = dataclasses.asdict(self.budget)
        require(
            any(limit is not None for limit in limits.values()),
            "budget",
            limits,
            f"needs at least one of {', '.join(limits)}",
        )
        require(
            self.match.ledger is None or limits[self.match.by] is not None,
            "match.by",
            self.match.by,
            f"needs budget.{self.match.by}, the amount to match",
        )


def _refuse_beyond_machines(key: str, value: object) -> None:
    """Refuse a number that is not finite, or a count that no machine holds."""
    if isinstance(value, float):
        require(math.isfinite(value), key, value, "must be finite")
    elif isinstance(value, int) and key not in NO_COUNTS:
        rule = f"must be at most {MAX_COUNT:,}, which is more than any machine holds"
        require(value <= MAX_COUNT, key, value, rule)


def panel_position(config: Config) -> PositionConfig:
    """Which tokens of a held-out document may be in the panel: those of the run, but for what
    `evaluation` says otherwise."""
    position, panel = config.position, config.evaluation
    if panel.selector is not None:
        position = dataclasses.replace(position, selector=panel.selector, marker=panel.marker)
    if panel.per_document is not None:
        position = dataclasses.replace(position, per_document=panel.per_document)
    return position


def keeps_ema(config: Config) -> bool:
    """Whether a run needs the EMA: it thinks, and measures its thoughts against it."""
    wanted = config.baseline.kind == "ema" or "ema" in config.engine.networks
    return config.objective.thinks and wanted


def needs_copies(config: Config) -> tuple[bool, bool]:
    """Whether a run needs a second copy of the starting checkpoint for the teacher, and a third
    that stays as it is, for the KL or a part from outside."""
    thinks = config.objective.thinks
    teacher = keeps_ema(config) or config.baseline.kind == "frozen"
    start = config.objective.kl_weight > 0 or "start" in config.engine.networks
    return thinks and teacher, thinks and start


# Reading and writing


def load_config(source: str | Path | dict, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply dotted overrides, and check every value.

    Args:
        source: the YAML file, or nested mappings in place of one.
        overrides: `section.key=value`, each value in YAML syntax.

    Raises:
        ConfigError: unknown key, wrong type, or a value that its section refuses.
    """
    if isinstance(source, dict):
        where, tree = "config", source
    else:
        path = Path(source)
        where, tree = str(path), read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{where} must hold sections such as `model:` and `data:`, got {type(tree).__name__}."
        )
    _refuse_text(tree, where)
    _refuse_unknown_keys(tree, where)

    overrides = overrides or []
    for override in overrides:
        given = _parse_override(override)
        _refuse_text(given, "command line")
        _refuse_unknown_keys(given, "command line")
    return _merge(tree, overrides, where)


def _parse_override(override: str) -> dict:
    """Nested mappings of `section.key=value`."""
    _refuse_text(override, "command line")
    if "=" not in override:
        raise ConfigError(
            f"{override!r} is no override. Write section.key=value, such as thought.group_size=8."
        )

    try:
        _refuse_depth(override.partition("=")[2])
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except _NO_YAML as error:
        raise ConfigError(
            f"command line: {override!r} has no YAML value: {first_line(error)}. Put text with"
            " signs in it in quotes, such as 'data.template=\"{text}\"'."
        ) from error


def _merge(tree: dict, overrides: list[str], where: str) -> Config:
    """The config that a file and overrides give, in the words of this project where OmegaConf
    refuses it."""
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Config), tree, OmegaConf.from_dotlist(overrides)
        )
        return OmegaConf.to_object(merged)
    except ConfigError:
        raise
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{where}: {error.full_key} has no value. Write {error.full_key}=VALUE on the command"
            " line, or the key in the file."
        ) from error
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None

        key = error.full_key or "a key"
        if "ListConfig" in str(error):  # OmegaConf's word for a list
            raise ConfigError(
                f"{where}: {key}: must be a list. Write it in brackets, as in {key}=[VALUE]."
            ) from error
        raise ConfigError(f"{where}: {key}: {first_line(error)}") from error


def to_yaml(config: Config) -> str:
    """The resolved config, every key written out, as `load_config` reads it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def known_keys(section: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key a config may have, in the order of the sections."""
    keys = []
    for item in dataclasses.fields(section):
        key = f"{prefix}{item.name}"
        keys.append(key)
        if dataclasses.is_dataclass(item.type):
            keys += known_keys(item.type, f"{key}.")
    return keys


def _refuse_unknown_keys(tree: dict, where: str) -> None:
    known = known_keys()
    sections = {item.name: item.type for item in dataclasses.fields(Config)}

    for section, content in tree.items():
        if section in sections and not isinstance(content, dict):
            example = next(key for key in known if key.startswith(f"{section}."))
            raise ConfigError(
                f"{where}: {section} is a section, got {content!r}. Write its keys, such as"
                f" {example}."
            )

        given = [str(section)]
        if isinstance(content, dict) and content:
            given = [f"{section}.{name}" for name in content]
        for key in given:
            if key not in known:
                raise ConfigError(f"{where}: unknown config key {key}. {_suggest(key, known)}")

        if section in sections:
            refuse_mappings_for_lists(sections[section], content, f"{where}: {section}.")


def refuse_mappings_for_lists(section: type, content: dict, where: str) -> None:
    """OmegaConf puts no mapping into a list either, and does not say which key it met."""
    for item in dataclasses.fields(section):
        value = content.get(item.name)
        if typing.get_origin(item.type) is list and isinstance(value, dict):
            raise ConfigError(f"{where}{item.name} must be a list, got {value!r}.")


RENAMED = {"thought.sampling_rows": "sampling.slots"}
"""Keys of configs that were written before, and what they are called."""


def _suggest(key: str, known: list[str]) -> str:
    """What an unknown key may have meant: the same name in another section, else the nearest key,
    else what there is."""
    if key in RENAMED:
        return f"Its name is {RENAMED[key]}."
    section, _, name = key.rpartition(".")
    leaves = [other for other in known if "." in other]

    meant = [other for other in leaves if other.rpartition(".")[2] == name]
    if not meant:
        candidates = leaves if section else known
        meant = difflib.get_close_matches(key, candidates, n=1, cutoff=0.7)
    if meant:
        return f"Did you mean {' or '.join(meant)}?"

    if section in known:
        inside = [other for other in leaves if other.startswith(f"{section}.")]
        return f"The section has {', '.join(inside)}."
    return f"The sections are {', '.join(other for other in known if '.' not in other)}."


# YAML, which may be a stranger's

MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**20, 100

_NO_YAML = (
    yaml.YAMLError,
    OmegaConfBaseException,
    OSError,
    ValueError,
    TypeError,
    RecursionError,
    AssertionError,  # OmegaConf asserts that it is no scalar
)
"""What a text that is no YAML, or is too much of it, makes the libraries raise."""


def read_yaml(path: Path) -> object:
    """`parse_yaml` of a file."""
    try:
        if not path.is_file():
            raise ConfigError(
                f"no config file at {path}{', which is a folder' if path.is_dir() else ''}. Write"
                " the path of a YAML file, such as configs/quickstart.yaml."
            )
        return parse_yaml(path.read_bytes().decode(), str(path))
    except OSError as error:
        raise ConfigError(
            f"{path} can not be read: {error.strerror}. Write the path of a YAML file, such as"
            " configs/quickstart.yaml."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a YAML config: {error}") from error


def parse_yaml(text: str, where: str) -> object:
    """Plain values of a YAML text.

    Raises:
        ConfigError: no YAML, or larger than `MAX_YAML_BYTES`, or with aliases that stand for more
            than 10,000 values (OmegaConf's limit; a few lines of them can stand for gigabytes), or
            with text that `_refuse_text` refuses.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(
            f"{where} is not a YAML config: {len(text):,} characters; expected fewer than"
            f" {MAX_YAML_BYTES:,}."
        )
    try:
        _refuse_depth(text)
        tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except _NO_YAML as error:
        raise ConfigError(f"{where} is not a YAML config: {error}") from error
    _refuse_text(tree, where)
    return tree


def _refuse_depth(text: str) -> None:
    """The C library that puts YAML together calls itself for each level, and a hundred thousand of
    them end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"nested more than {MAX_YAML_DEPTH} levels deep")


# Text that no config may hold

SECRET = re.compile(
    r"\b(hf_|gh[a-z]_|github_pat_|glpat-|sk-|xox[a-z]-)[\w-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<![\w-])eyJ[\w-]{16,}\.[\w-]+\.[\w-]*"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
"""Access tokens by the forms of those who issue them, and user:password of a URL."""


def without_secrets(text: str) -> str:
    """The text with access tokens taken out: by their form, and those that environment variables
    hold."""
    for name, value in os.environ.items():
        if re.search(r"(TOKEN|KEY|SECRET|PASSWORD)$", name.upper()) and len(value) >= 8:
            text = text.replace(value, "[secret]")
    return SECRET.sub("[secret]", text)


def _refuse_text(value: object, where: str) -> None:
    """Refuse text that no file name and no run folder may hold, at any depth, keys too. Secrets are
    not repeated in the message."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_text(key, where)
            _refuse_text(inner, f"{where}: {key}")
    elif isinstance(value, list):
        for inner in value:
            _refuse_text(inner, where)
    elif isinstance(value, str):
        _refuse_line(value, where)


def _refuse_line(text: str, where: str) -> None:
    if without_secrets(text) != text:
        raise ConfigError(
            f"{where} holds an access token or a password. A config is copied to the run folder"
            " and its report: put secrets in the environment only, such as HF_TOKEN."
        )
    if "${" in text:
        raise ConfigError(
            f"{where}: {text!r} holds `${{`: interpolation is not read here, because it could copy"
            " environment variables into the run folder. Write the value itself."
        )
    if "\0" in text or any(unicodedata.category(character) == "Cs" for character in text):
        raise ConfigError(
            f"{where}: {text!r} holds a NUL or half of a surrogate pair, which no file name can"
            " hold."
        )


def first_line(error: Exception) -> str:
    """What an error says first, without a full stop; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

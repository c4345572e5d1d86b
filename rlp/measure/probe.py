"""The command `rlp probe`: whether a checkpoint gains by thinking on given documents, as a table,
in words and as files.

Asked before a run: where thoughts of one position predict alike, or a thought does no better than
one about another document, the reward has nothing to select, and training selects noise.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow
from pyarrow import parquet
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from rlp.config import Config, ConfigError, load_config
from rlp.learn.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from rlp.learn.export import read_thought_format
from rlp.measure.figures import COLORS, GREY
from rlp.measure.metrics import EVALUATION
from rlp.measure.panel import Probe, probe_model
from rlp.model.setup import PanelSetup
from rlp.process.console import visible_text
from rlp.process.files import new_file, new_folder, write_new
from rlp.process.ranks import start_ranks, stop_ranks

TABLE = {
    "gain_over_start_nats": "gain over the start",
    "gain_over_no_think_nats": "gain over no thought",
    "gain_over_empty_nats": "gain over an empty thought",
    "gain_over_shuffled_nats": "gain over another document's thoughts",
    "positive_gain_frac": "positions with a positive gain",
    "accuracy_with_thought": "accuracy with a thought",
    "accuracy_without_thought": "accuracy without",
    "reward_group_std_nats": "spread of reward among siblings",
    "reward_length_correlation": "correlation of length and reward",
    "thought_tokens_mean": "thought length",
    "thought_truncated_frac": "thoughts left unclosed",
    "thought_empty_frac": "empty thoughts",
    "open_marker_mass": "mass on the open marker",
    "document_loss_nats": "loss of the documents",
}
"""Rows of the table, in the words that they are told in."""

GAINS = tuple(name for name in TABLE if name.startswith("gain_over_"))

MIN_DOCUMENTS = 30
"""Documents that a verdict needs: percentile intervals of fewer hold the mean in 80 to 89 % of the
cases where they say 95."""

MIN_GAINING_FRAC = 0.05
"""Of positions, the lower end of its interval: where fewer gain, there is nothing to select.
Ours."""

FORMAT_SHARE = 0.5
"""Of the gain, or the harm, of thinking: what an empty thought has to explain for the format to be
named as its cause. Ours."""

SHOWN_TAIL_TOKENS, SHOWN_CHARACTERS = 64, 240
"""Of a prefix, its end that is written as text; and of any text, what the terminal gets."""

FLAT_GROUP_NATS = 1e-4
"""Spread of reward within groups below which advantages are rounding."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is probed, and how it thinks."""

    config: Config
    checkpoint: Checkpoint | None
    """A run's; None for a Hugging Face folder or Hub name."""
    instruction: tuple[int, ...]
    """Token ids put before the prefix, where the checkpoint says so and the config names no
    file."""


def find_subject(name: str, data: str, config: Path | None, overrides: list[str]) -> Subject:
    """Settings in this order, the later ones win: defaults, `config`, what the checkpoint says of
    itself, `overrides`.

    Args:
        name: a Hugging Face folder, a Hub name, or a checkpoint of a run, which holds the config of
            its run.
        data: as one of `data.held_out`.
        config: a YAML file or a run folder.

    Raises:
        ConfigError: nothing there, or nothing that can be probed.
    """
    path, documents = Path(name), f"data.held_out={_as_yaml([data])}"
    if (path / "meta.json").is_file():
        if config is not None:
            raise ConfigError(
                f"--config {config}: {path} is a checkpoint of a run and holds the config of its"
                " run. Leave --config out, and write single settings as section.key=value."
            )
        checkpoint, own = _open(path)
        return Subject(load_config(own, [*overrides, documents]), checkpoint, ())
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} is a run folder. Write one of its models, such as {path / 'export'} or a"
            f" folder in {path / 'checkpoints'}."
        )
    manifest = read_thought_format(path / "thought_format.json")
    settings = {
        f"thought.{key}": manifest.get(key)
        for key in ("open_marker", "close_marker", "temperature", "max_thought_tokens")
    }
    settings |= {
        "target.temperature": manifest.get("target_temperature"),
        "target.horizon": manifest.get("horizon"),
    }
    said = [f"{key}={_as_yaml(value)}" for key, value in settings.items() if value is not None]
    # A config is that of a run; a probe reads no training documents and spends no budget.
    source = (
        {"data": {"train": [data]}, "budget": {"steps": 1}}
        if config is None
        else config / "config.yaml"
        if config.is_dir()
        else config
    )
    resolved = load_config(
        source,
        [
            "run.dir=unused",
            "model.init=pretrained",
            "model.tokenizer=null",
            *said,
            *overrides,
            f"model.path={_as_yaml(name)}",
            documents,
        ],
    )
    return Subject(
        resolved,
        None,
        () if resolved.thought.instruction_file else tuple(manifest.get("instruction_ids", ())),
    )


def _as_yaml(value: object) -> str:
    """A value as it stands on the command line. YAML reads JSON, but no character in two
    escapes."""
    return json.dumps(value, ensure_ascii=False)


def _open(path: Path) -> tuple[Checkpoint, dict]:
    """A checkpoint and the config of its run."""
    try:
        checkpoint = open_checkpoint(path)
        return checkpoint, checkpoint.config
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def probe_checkpoint(
    name: str,
    data: str,
    *,
    config: Path | None,
    start: str | None,
    out: Path | None,
    overrides: list[str],
    console: Console,
) -> None:
    """Probe, print, and write `out` where it is given.

    Raises:
        ConfigError, DataError: as `find_subject` and `probe_model`; or `out` exists, which is seen
            before anything is loaded.
    """
    if out is not None and out.exists():
        raise ConfigError(f"--out: {out} exists and is never written over. Write another folder.")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(
            f"--out: there is no folder {out.absolute().parent}. Make it, or write another path."
        )
    subject = find_subject(name, data, config, overrides)
    ranks = start_ranks()
    try:
        setup = PanelSetup(
            subject.config, lambda text: console.print(visible_text(f"data: {text}"))
        )
        for note in setup.marker_notes():
            console.print(visible_text(note))
        probe = probe_model(
            setup,
            ranks,
            start=start,
            checkpoint=subject.checkpoint,
            instruction=subject.instruction,
        )
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    finally:
        stop_ranks()
    unusable = sorted(
        measured for measured, value in probe.means.items() if not math.isfinite(value)
    )
    if unusable:
        raise ConfigError(
            f"{name}: not finite: {', '.join(unusable)}. Its weights, or the logits they lead to,"
            " are of no use; write another checkpoint."
        )
    own_start = start is None and subject.checkpoint is None
    sentences = verdict(probe, subject.config)
    console.print(describe(name, data, probe, subject.config))
    console.print(table(probe, own_start))
    console.print("\n".join([*sentences, "", *three_thoughts(probe, setup.tokenizer)]))
    if out is not None:
        settings = {
            section: values
            for section, values in asdict(subject.config).items()
            if section in ("model", "data", "position", "thought", "target", "evaluation", "engine")
        }
        content = {
            "checkpoint": name,
            "start": start,
            "settings": settings,
            "means": probe.means,
            "intervals": probe.intervals,
            "verdict": sentences,
        }
        with new_folder(out, point="probe.before_rename") as new:
            with new_file(new / "rows.parquet", point="probe.torn_rows") as file:
                write_rows(probe, setup.tokenizer, file)
            with new_file(new / "probe.png", point="probe.torn_picture") as file:
                draw(
                    probe, own_start, file, title=f"{name}: {len(probe.panel)} positions of {data}"
                )
            write_new(
                new / "probe.json",
                json.dumps(content, indent=1, allow_nan=False).encode(),
                point="probe.torn_numbers",
            )
        console.print(f"written to {out}: probe.json, rows.parquet, probe.png")


def describe(name: str, data: str, probe: Probe, config: Config) -> str:
    """What was probed, in two lines."""
    thought, position = config.thought, config.position
    where = f"after {position.marker!r}" if position.marker else "drawn uniformly"
    return (
        f"{name} on {data}: {len(probe.panel)} positions {where} in {len(probe.panel.documents)}"
        f" documents, horizon {config.target.horizon}\n{config.evaluation.thoughts_per_position}"
        f" thoughts each between {thought.open_marker!r} and {thought.close_marker!r}, at most"
        f" {thought.max_thought_tokens} tokens, temperature {thought.temperature:g}\n"
    )


def table(probe: Probe, own_start: bool) -> Table:
    """The means with their intervals.

    Args:
        own_start: the model is its own start, whose gain is then that over no thought.
    """
    shown = Table("", "mean", "95 % interval", "", box=None, pad_edge=False)
    for column in shown.columns:
        column.no_wrap = True
    shown.columns[1].justify = shown.columns[2].justify = "right"
    for name, words in TABLE.items():
        if name in probe.means and not (own_start and name == "gain_over_start_nats"):
            interval = probe.intervals.get(name)
            sign = "+" if name in GAINS or name == "reward_length_correlation" else ""
            shown.add_row(
                words,
                f"{probe.means[name]:{sign}.3f}",
                f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}" if interval else "",
                EVALUATION[name].unit,
            )
    return shown


def verdict(probe: Probe, config: Config) -> list[str]:
    """Whether there is signal; whether thoughts are on topic, and whether there is something to
    select; what they are worth; and what usually helps where there is no signal."""
    obstacle = _no_verdict(probe)
    sentences = [obstacle] if obstacle else [_signal(probe), _topic(probe), _selection(probe)]
    sentences += [_worth(probe), *_format(probe), *_cautions(probe)]
    return sentences + ([] if has_signal(probe) else _advice(probe, config))


def has_signal(probe: Probe) -> bool:
    """Whether thoughts are about their own text, some of them gain, and siblings differ."""
    if _no_verdict(probe):
        return False
    return _is_on_topic(probe) and _some_gain(probe) and _siblings_differ(probe)


def _no_verdict(probe: Probe) -> str | None:
    """Why nothing can be said of the signal; None where something can."""
    documents = len(probe.panel.documents)
    if documents < MIN_DOCUMENTS:
        return (
            f"No verdict: the panel holds {documents} document{'s' * (documents > 1)}, and "
            f"below {MIN_DOCUMENTS} intervals are too short to be trusted. "
            "Give it more documents, and write a larger evaluation.panel_positions."
        )
    if "reward_group_std_nats" not in probe.means:
        return (
            "No verdict: one thought at each position has no siblings to be compared with. Write"
            " evaluation.thoughts_per_position=4."
        )
    return None


def _is_on_topic(probe: Probe) -> bool:
    """Whether thoughts predict their own targets better than those of another document do."""
    return probe.intervals["gain_over_shuffled_nats"][0] > 0


def _some_gain(probe: Probe) -> bool:
    return probe.intervals["positive_gain_frac"][0] >= MIN_GAINING_FRAC


def _siblings_differ(probe: Probe) -> bool:
    return probe.means["reward_group_std_nats"] > FLAT_GROUP_NATS


def _signal(probe: Probe) -> str:
    if has_signal(probe):
        return (
            "SIGNAL: thoughts are about their own text, some of them gain, and siblings "
            "differ: there is something to select."
        )
    if not _siblings_differ(probe):
        return "NO SIGNAL: the thoughts of a position all predict alike, so every advantage is 0."
    if not _is_on_topic(probe):
        return (
            "NO SIGNAL: thoughts can not be told from those of another document, so what is "
            "selected is chance."
        )
    return (
        "NO SIGNAL: thoughts are about their own text, and all but none of them gains: what is "
        "selected is the lesser harm."
    )


def _topic(probe: Probe) -> str:
    gain = probe.means["gain_over_shuffled_nats"]
    low, high = probe.intervals["gain_over_shuffled_nats"]
    said = (
        "On topic: yes, a"
        if low > 0
        else (
            "On topic: no, another document's is the better one; a"
            if high < 0
            else "On topic: not as far as this panel can see; a"
        )
    )
    return (
        f"{said} thought predicts its own target {gain:+.3f} nats (interval {low:+.3f} to "
        f"{high:+.3f}) better than the thoughts of another document do."
    )


def _selection(probe: Probe) -> str:
    gaining, (low, high) = probe.means["positive_gain_frac"], probe.intervals["positive_gain_frac"]
    said = "yes" if _some_gain(probe) and _siblings_differ(probe) else "no"
    return (
        f"Something to select: {said}, thoughts gain at {gaining:.0%} of the positions "
        f"(interval {low:.0%} to {high:.0%}, its lower end has to be {MIN_GAINING_FRAC:.0%}), "
        f"and siblings differ by {probe.means['reward_group_std_nats']:.2g} nats."
    )


def _worth(probe: Probe) -> str:
    means = probe.means
    low, high = probe.intervals.get("gain_over_no_think_nats", (-math.inf, math.inf))
    effect = "helps" if low > 0 else "harms" if high < 0 else "neither clearly helps nor harms"
    return (
        f"Thinking {effect}: {means['gain_over_no_think_nats']:+.3f} nats against no thought "
        f"and {means['gain_over_empty_nats']:+.3f} against an empty one."
    )


def _format(probe: Probe) -> list[str]:
    """Where an empty thought explains most of what thinking gains or costs, that it does: then the
    words of a thought do not.

        S_pred - S_no_think = (S_pred - S_empty) + (S_empty - S_no_think)
    """
    gain = probe.means["gain_over_no_think_nats"]
    low, high = probe.intervals.get("gain_over_no_think_nats", (-math.inf, math.inf))
    of_format = gain - probe.means["gain_over_empty_nats"]
    if low <= 0 <= high or of_format / gain < FORMAT_SHARE:
        return []
    if gain > 0:
        return [
            "The markers do it: an empty thought, the two markers alone, gains "
            f"{of_format:.2f} nats, thinking {gain:.2f}. The words of a thought add little."
        ]
    won = gain - of_format
    words = f", of which the words of a thought win back {won:.2f}" if won > 0 else ""
    return [
        "The markers do the harm: an empty thought, the two markers alone, costs "
        f"{-of_format:.2f} nats{words}, thinking {-gain:.2f}. The model has not learned "
        "that after the close marker the text goes on; a warm start teaches it "
        "(docs/warm_start.md)."
    ]


def _cautions(probe: Probe) -> list[str]:
    means, sentences = probe.means, []
    correlation = means.get("reward_length_correlation", 0.0)
    low, high = probe.intervals.get("reward_length_correlation", (0.0, 0.0))
    if abs(correlation) > 0.1 and (low > 0 or high < 0):
        sentences.append(
            f"{'Longer' if correlation > 0 else 'Shorter'} thoughts predict better (correlation"
            f" {correlation:+.2f}): the first updates will"
            f" {'lengthen' if correlation > 0 else 'shorten'} thoughts."
        )
    if means["thought_truncated_frac"] > 0.5:
        sentences.append(
            f"{means['thought_truncated_frac']:.0%} of the thoughts were left unclosed and closed"
            " by force: the model does not end its thoughts within the budget."
        )
    if means["thought_empty_frac"] > 0.5:
        sentences.append(f"{means['thought_empty_frac']:.0%} of the thoughts are empty.")
    return sentences


def _advice(probe: Probe, config: Config) -> list[str]:
    """What is missing most often first, the rest in the order of what it costs to try."""
    lines = [
        "What usually helps:",
        (
            "  a warm start: train first on documents with thoughts "
            "between the markers, then probe again (docs/warm_start.md)"
        ),
    ]
    if (
        probe.means.get("reward_group_std_nats", 0.0) > FLAT_GROUP_NATS
        and probe.means.get("gain_over_shuffled_nats", 0.0) > 0
    ):
        lines.append(
            "  a larger panel, if the signal is only small:"
            f" evaluation.panel_positions={4 * config.evaluation.panel_positions}"
        )
    if config.position.selector != "marker":
        lines.append(
            "  positions where a thought can matter, such as those before an answer:"
            " position.selector=marker position.marker=TEXT"
        )
    if config.target.horizon == 1:
        lines.append(
            "  a longer horizon, so that the reward is not the luck of one token: target.horizon=16"
        )
    if config.thought.max_thought_tokens < 2048:
        lines.append(
            "  a larger budget on real text: thought.max_thought_tokens=2048; budgets of 64 to 512"
            " tokens did harm in the paper (Table S.1)"
        )
    return lines


def three_thoughts(probe: Probe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The thought with the largest gain over no thought, the one in the middle, and the one with
    the smallest."""
    gain = probe.reasoned_logprob - probe.columns["no_think_logprob_nats"][:, None]
    order = gain.argsort(axis=None, kind="stable")
    lines = []
    for name, index in (
        ("best", order[-1]),
        ("median", order[len(order) // 2]),
        ("worst", order[0]),
    ):
        m, g = (int(place) for place in np.unravel_index(index, gain.shape))
        document = probe.panel.documents[probe.panel.positions.document[m]]
        position = int(probe.panel.positions.position[m])
        cut = ", closed by force" if probe.thoughts.truncated[m, g] else ""
        lines += [
            (
                f"The {name} thought: {gain[m, g]:+.3f} nats against no thought (document "
                f"{document.id}, position {position}, {len(probe.thoughts.tokens[m][g])} "
                f"tokens{cut})"
            ),
            f"  text     {_shown(_tail(tokenizer, document.tokens, position), end=True)}",
            f"  thought  {_shown(tokenizer.decode(probe.thoughts.tokens[m][g]))}",
            f"  target   {_shown(tokenizer.decode(probe.panel.positions.target[m]))}",
        ]
    return lines


def _tail(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, position: int) -> str:
    """The end of a prefix."""
    return tokenizer.decode(tokens[max(0, position - SHOWN_TAIL_TOKENS) : position])


def _shown(text: str, *, end: bool = False) -> str:
    """Text in one line between bars, control characters and line ends spelled out, a long one cut
    (at its start, for `end`)."""
    text = visible_text(text).replace("\n", "\\n").replace("\t", "\\t")
    if len(text) > SHOWN_CHARACTERS:
        text = f"...{text[-SHOWN_CHARACTERS:]}" if end else f"{text[:SHOWN_CHARACTERS]}..."
    return f"|{text}|"


def write_rows(probe: Probe, tokenizer: PreTrainedTokenizerBase, file: BinaryIO) -> None:
    """One row a position as Parquet: where it is, every token as its id and as text to read (of the
    prefix its end), what each thought led to, and all columns."""
    positions, ids = probe.panel.positions, pyarrow.list_(pyarrow.int64())
    documents = [probe.panel.documents[d] for d in positions.document]
    columns = {
        "document": pyarrow.array([document.id for document in documents]),
        "position": pyarrow.array(positions.position),
        "prefix_tokens": pyarrow.array(
            [document.tokens[:t] for document, t in zip(documents, positions.position)], ids
        ),
        "target_tokens": pyarrow.array(list(positions.target), ids),
        "thought_tokens": pyarrow.array(probe.thoughts.tokens, pyarrow.list_(ids)),
        "thought_truncated": pyarrow.array(list(probe.thoughts.truncated)),
        "thought_logprob_nats": pyarrow.array(list(probe.reasoned_logprob)),
        "prefix_tail": pyarrow.array(
            [
                _tail(tokenizer, document.tokens, int(t))
                for document, t in zip(documents, positions.position)
            ]
        ),
        "thoughts": pyarrow.array(
            [[tokenizer.decode(thought) for thought in group] for group in probe.thoughts.tokens]
        ),
        "target": pyarrow.array([tokenizer.decode(target) for target in positions.target]),
    }
    parquet.write_table(
        pyarrow.table(
            columns | {name: pyarrow.array(values) for name, values in probe.columns.items()}
        ),
        file,
    )


def draw(probe: Probe, own_start: bool, file: BinaryIO, *, title: str) -> None:
    """The gains with their intervals, and how the gains of single positions are spread."""
    from matplotlib.figure import Figure

    names = [
        name
        for name in GAINS
        if name in probe.means and not (own_start and name == "gain_over_start_nats")
    ]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    bars, spread = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for y, name in enumerate(names):
        low, high = probe.intervals.get(name, (probe.means[name],) * 2)
        bars.barh(y, probe.means[name], height=0.6, color=COLORS[y], alpha=0.8)
        bars.plot([low, high], [y, y], color="black", linewidth=1.5)
    bars.set_yticks(range(len(names)), [TABLE[name] for name in names])
    bars.invert_yaxis()
    bars.set_xlabel("nats, with 95 % intervals")
    shown = [
        name
        for name in ("gain_over_no_think_nats", "gain_over_shuffled_nats")
        if name in probe.columns
    ]
    ends = [
        min(probe.columns[name].min() for name in shown),
        max(probe.columns[name].max() for name in shown),
    ]
    for name in shown:
        spread.hist(
            probe.columns[name],
            bins=30,
            range=ends,
            histtype="stepfilled",
            alpha=0.4,
            color=COLORS[names.index(name)],
        )
    spread.set_xlabel("gain at a position, nats")
    spread.set_ylabel("positions")
    for axes in (bars, spread):
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a name may hold dollar signs
    figure.savefig(file, format="png", dpi=130)

"""The command `rlp probe`: whether a checkpoint gains by thinking on given documents, as a table,
in words and as files. Asked before a run.
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

from rlp.config import Config, ConfigError, load_config, panel_position
from rlp.learn.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from rlp.learn.export import read_thought_format
from rlp.measure.decomposition import Decomposition
from rlp.measure.figures import COLORS, GREY
from rlp.measure.frozen import measure_model
from rlp.measure.metrics import EVALUATION
from rlp.measure.reward_signal import signal_in_words
from rlp.model.setup import PanelSetup
from rlp.process.console import visible_text
from rlp.process.files import new_file, new_folder, refuse_existing, write_new
from rlp.process.ranks import start_ranks, stop_ranks

TABLE = {
    "gain_over_start_nats": "gain over the start",
    "gain_over_no_think_nats": "gain over no thought",
    "gain_over_empty_nats": "gain over an empty thought",
    "gain_over_shuffled_nats": "gain over another document's thoughts",
    "cross_selected_gain_nats": "gain, chosen by the other half",
    "surest_thought_gain_nats": "gain of the surest thought",
    "positive_gain_frac": "positions with a positive gain",
    "accuracy_with_thought": "accuracy with a thought",
    "accuracy_without_thought": "accuracy without",
    "surest_thought_accuracy": "accuracy of the surest thought",
    "reward_group_std_nats": "spread of reward among siblings",
    "reward_length_correlation": "correlation of length and reward",
    "thought_tokens_mean": "thought length",
    "thought_truncated_frac": "thoughts left unclosed",
    "thought_empty_frac": "empty thoughts",
    "open_marker_mass": "mass on the open marker",
    "document_loss_nats": "loss of the documents",
}
"""Rows of the table, in the words that they are told in."""

GAINS = tuple(name for name in TABLE if "gain_" in name and name.endswith("_nats"))

SHOWN_TAIL_TOKENS, SHOWN_CHARACTERS = 64, 240
"""Of a prefix, its end that is written as text; and of any text, what the terminal gets."""


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
    # A config is that of a run; a probe reads no training documents and spends no budget.
    source = {"data": {"train": [data]}, "budget": {"steps": 1}}
    if config is not None:
        source = config / "config.yaml" if config.is_dir() else config
    resolved = load_config(
        source,
        [
            "run.dir=unused",
            "model.init=pretrained",
            "model.tokenizer=null",
            *_said_of_itself(manifest),
            *overrides,
            f"model.path={_as_yaml(name)}",
            documents,
        ],
    )
    instruction = () if resolved.thought.instruction_file else manifest.get("instruction_ids", ())
    return Subject(resolved, None, tuple(instruction))


def _said_of_itself(manifest: dict) -> list[str]:
    """The settings that a `thought_format.json` holds, as overrides."""
    names = {
        "thought.open_marker": "open_marker",
        "thought.close_marker": "close_marker",
        "thought.temperature": "temperature",
        "thought.max_thought_tokens": "max_thought_tokens",
        "target.temperature": "target_temperature",
        "target.horizon": "horizon",
    }
    return [
        f"{setting}={_as_yaml(manifest[name])}"
        for setting, name in names.items()
        if manifest.get(name) is not None
    ]


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
        ConfigError, DataError: as `find_subject` and `measure_model`; or `out` exists, which is
            seen before anything is loaded.
    """
    if out is not None:
        refuse_existing(out)
        if not out.absolute().parent.is_dir():
            raise ConfigError(
                f"--out: there is no folder {out.absolute().parent}. Make it, or write another"
                " path."
            )

    subject = find_subject(name, data, config, overrides)
    found, tokenizer = _measure(name, subject, start, console)
    own_start = start is None and subject.checkpoint is None
    sentences = signal_in_words(found, subject.config)
    console.print(describe(name, data, found, subject.config))
    console.print(table(found, own_start))
    console.print("\n".join([*sentences, "", *three_thoughts(found, tokenizer)]))
    if out is None:
        return

    sections = ("model", "data", "position", "thought", "target", "evaluation", "engine")
    settings = asdict(subject.config)
    content = {
        "checkpoint": name,
        "start": start,
        "settings": {section: settings[section] for section in settings if section in sections},
        "means": found.means,
        "intervals": found.intervals,
        "verdict": sentences,
    }
    numbers = json.dumps(content, indent=1, allow_nan=False)
    title = f"{name}: {len(found.panel)} positions of {data}"
    with new_folder(out, point="probe.before_rename") as new:
        with new_file(new / "rows.parquet", point="probe.torn_rows") as file:
            write_rows(found, tokenizer, file)
        with new_file(new / "probe.png", point="probe.torn_picture") as file:
            draw(found, own_start, file, title=title)
        write_new(new / "probe.json", numbers.encode(), point="probe.torn_numbers")
    console.print(f"written to {out}: probe.json, rows.parquet, probe.png")


def _measure(
    name: str, subject: Subject, start: str | None, console: Console
) -> tuple[Decomposition, PreTrainedTokenizerBase]:
    """What the panel says of the subject, and the tokenizer that it is read with."""
    ranks = start_ranks(subject.config.run.watchdog_s)
    try:
        setup = PanelSetup(
            subject.config, lambda text: console.print(visible_text(f"data: {text}"))
        )
        for note in setup.marker_notes():
            console.print(visible_text(note))
        found = measure_model(
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

    unusable = sorted(column for column, mean in found.means.items() if not math.isfinite(mean))
    if unusable:
        raise ConfigError(
            f"{name}: not finite: {', '.join(unusable)}. Its weights, or the logits they lead to,"
            " are of no use; write another checkpoint."
        )
    return found, setup.tokenizer


def describe(name: str, data: str, found: Decomposition, config: Config) -> str:
    """What was probed, in two lines."""
    thought, position = config.thought, panel_position(config)
    where = f"after {position.marker!r}" if position.marker else "drawn uniformly"
    return (
        f"{name} on {data}: {len(found.panel)} positions {where} in {len(found.panel.documents)}"
        f" documents, horizon {config.target.horizon}\n{config.evaluation.thoughts_per_position}"
        f" thoughts each between {thought.open_marker!r} and {thought.close_marker!r}, at most"
        f" {thought.max_thought_tokens} tokens, temperature {thought.temperature:g}\n"
    )


def table(found: Decomposition, own_start: bool) -> Table:
    """The means with their intervals.

    Args:
        own_start: the model is its own start, whose gain is then that over no thought.
    """
    shown = Table("", "mean", "95 % interval", "", box=None, pad_edge=False)
    for column in shown.columns:
        column.no_wrap = True
    shown.columns[1].justify = shown.columns[2].justify = "right"
    for name, words in TABLE.items():
        if name not in found.means or (own_start and name == "gain_over_start_nats"):
            continue
        sign = "+" if name in GAINS or name == "reward_length_correlation" else ""
        ends = (f"{end:{sign}.3f}" for end in found.intervals.get(name, ()))
        mean = f"{found.means[name]:{sign}.3f}"
        shown.add_row(words, mean, " to ".join(ends), EVALUATION[name].unit)
    return shown


def three_thoughts(found: Decomposition, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The thought with the largest gain over no thought, the one in the middle, and the one with
    the smallest."""
    gain = found.reasoned_logprob - found.columns["no_think_logprob_nats"][:, None]
    order = gain.argsort(axis=None, kind="stable")
    chosen = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    positions, lines = found.panel.positions, []
    for name, index in chosen.items():
        m, g = (int(place) for place in np.unravel_index(index, gain.shape))
        document, t = found.panel.documents[positions.document[m]], int(positions.position[m])
        thought = found.thoughts.tokens[m][g]
        cut = ", closed by force" if found.thoughts.truncated[m, g] else ""
        lines += [
            f"The {name} thought: {gain[m, g]:+.3f} nats against no thought (document"
            f" {document.id}, position {t}, {len(thought)} tokens{cut})",
            f"  text     {_shown(_tail(tokenizer, document.tokens, t), end=True)}",
            f"  thought  {_shown(tokenizer.decode(thought))}",
            f"  target   {_shown(tokenizer.decode(positions.target[m]))}",
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


def write_rows(found: Decomposition, tokenizer: PreTrainedTokenizerBase, file: BinaryIO) -> None:
    """One row a position as Parquet: where it is, every token as its id and as text to read (of the
    prefix its end), what each thought led to, and all columns."""
    positions, ids = found.panel.positions, pyarrow.list_(pyarrow.int64())
    documents = [found.panel.documents[d] for d in positions.document]
    prefixes, tails, texts = [], [], []
    for document, t, group in zip(documents, positions.position, found.thoughts.tokens):
        prefixes.append(document.tokens[:t])
        tails.append(_tail(tokenizer, document.tokens, int(t)))
        texts.append([tokenizer.decode(thought) for thought in group])

    columns = {
        "document": pyarrow.array([document.id for document in documents]),
        "position": pyarrow.array(positions.position),
        "prefix_tokens": pyarrow.array(prefixes, ids),
        "target_tokens": pyarrow.array(list(positions.target), ids),
        "thought_tokens": pyarrow.array(found.thoughts.tokens, pyarrow.list_(ids)),
        "thought_truncated": pyarrow.array(list(found.thoughts.truncated)),
        "thought_logprob_nats": pyarrow.array(list(found.reasoned_logprob)),
        "prefix_tail": pyarrow.array(tails),
        "thoughts": pyarrow.array(texts),
        "target": pyarrow.array([tokenizer.decode(target) for target in positions.target]),
    }
    columns |= {name: pyarrow.array(values) for name, values in found.columns.items()}
    parquet.write_table(pyarrow.table(columns), file)


def draw(found: Decomposition, own_start: bool, file: BinaryIO, *, title: str) -> None:
    """The gains with their intervals, and how the gains of single positions are spread."""
    from matplotlib.figure import Figure

    hidden = {"gain_over_start_nats"} if own_start else set()
    names = [name for name in GAINS if name in found.means and name not in hidden]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    bars, spread = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for y, name in enumerate(names):
        low, high = found.intervals.get(name, (found.means[name],) * 2)
        bars.barh(y, found.means[name], height=0.6, color=COLORS[y], alpha=0.8)
        bars.plot([low, high], [y, y], color="black", linewidth=1.5)
    bars.set_yticks(range(len(names)), [TABLE[name] for name in names])
    bars.invert_yaxis()
    bars.set_xlabel("nats, with 95 % intervals")

    two = ("gain_over_no_think_nats", "gain_over_shuffled_nats")
    shown = {name: found.columns[name] for name in two if name in found.columns}
    ends = (
        min(values.min() for values in shown.values()),
        max(values.max() for values in shown.values()),
    )
    style = {"bins": 30, "range": ends, "histtype": "stepfilled", "alpha": 0.4}
    for name, values in shown.items():
        spread.hist(values, color=COLORS[names.index(name)], **style)
    spread.set_xlabel("gain at a position, nats")
    spread.set_ylabel("positions")
    for axes in (bars, spread):
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a name may hold dollar signs
    figure.savefig(file, format="png", dpi=130)

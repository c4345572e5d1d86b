"""The command `rlp probe`: whether a checkpoint gains by thinking on given documents, as a table, in words and as files.

Asked before a run: where thoughts of one position predict alike, or a thought does no better than one about another
document, the reward has nothing to select, and training selects noise.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from rlp.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from rlp.config import Config, ConfigError, load_config
from rlp.distributed import start_ranks, stop_ranks
from rlp.export import read_thought_format
from rlp.figures import COLORS, GREY
from rlp.metrics import EVALUATION
from rlp.probe import Probe, probe_model

TABLE = {
    "gain_over_start_nats": "gain over the start", "gain_over_no_think_nats": "gain over no thought", "gain_over_empty_nats": "gain over an empty thought",
    "gain_over_shuffled_nats": "gain over another document's thoughts", "positive_gain_frac": "positions with a positive gain",
    "accuracy_with_thought": "accuracy with a thought", "accuracy_without_thought": "accuracy without", "reward_group_std_nats": "spread of reward among siblings",
    "reward_length_correlation": "correlation of length and reward", "thought_tokens_mean": "thought length", "thought_truncated_frac": "thoughts left unclosed",
    "thought_empty_frac": "empty thoughts", "open_marker_mass": "mass on the open marker", "document_loss_nats": "loss of the documents",
}
"""Rows of the table, in the words that they are told in."""

GAINS = tuple(name for name in TABLE if name.startswith("gain_over_"))

FLAT_GROUP_NATS = 1e-4
"""Spread of reward within groups below which advantages are rounding."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is probed, and how it thinks."""

    config: Config
    checkpoint: Checkpoint | None
    """A run's; None for a Hugging Face folder or Hub name."""
    instruction: tuple[int, ...]
    """Token ids put before the prefix, where the checkpoint says so and the config names no file."""


def find_subject(name: str, data: str, config: Path | None, overrides: list[str]) -> Subject:
    """Settings in this order, the later ones win: defaults, `config`, what the checkpoint says of itself, `overrides`.

    Args:
        name: a Hugging Face folder, a Hub name, or a checkpoint of a run, which holds the config of its run.
        data: as one of `data.held_out`.
        config: a YAML file or a run folder.

    Raises:
        ConfigError: nothing there, or nothing that can be probed.
    """
    path, documents = Path(name), f"data.held_out={json.dumps([data])}"
    if (path / "meta.json").is_file():
        if config is not None:
            raise ConfigError(f"--config {config}: {path} is a checkpoint of a run and holds the config of its run. Leave --config out, and write single settings as section.key=value.")
        checkpoint = _open(path)
        return Subject(load_config(checkpoint.state["config"], [*overrides, documents]), checkpoint, ())
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{path} is a run folder. Write one of its models, such as {path / 'export'} or a folder in {path / 'checkpoints'}.")
    manifest = read_thought_format(path / "thought_format.json")
    settings = {f"thought.{key}": manifest.get(key) for key in ("open_marker", "close_marker", "temperature", "max_thought_tokens")}
    settings |= {"target.temperature": manifest.get("target_temperature"), "target.horizon": manifest.get("horizon")}
    said = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
    # A config is that of a run; a probe reads no training documents and spends no budget.
    source = {"data": {"train": [data]}, "budget": {"steps": 1}} if config is None else config / "config.yaml" if config.is_dir() else config
    resolved = load_config(source, ["run.dir=unused", "model.init=pretrained", "model.tokenizer=null", *said, *overrides, f"model.path={json.dumps(name)}", documents])
    return Subject(resolved, None, () if resolved.thought.instruction_file else tuple(manifest.get("instruction_ids", ())))


def _open(path: Path) -> Checkpoint:
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def probe_checkpoint(name: str, data: str, *, config: Path | None, start: str | None, out: Path | None, overrides: list[str], console: Console) -> None:
    """Probe, print, and write `out` where it is given.

    Raises:
        ConfigError, DataError: as `find_subject` and `probe_model`; or `out` exists, which is seen before anything is loaded.
    """
    if out is not None and out.exists():
        raise ConfigError(f"--out: {out} exists and is never written over. Write another folder.")
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.absolute().parent}. Make it, or write another path.")
    subject = find_subject(name, data, config, overrides)
    ranks = start_ranks()
    try:
        probe = probe_model(subject.config, ranks, start=start, checkpoint=subject.checkpoint, instruction=subject.instruction,
                            warn=lambda text: console.print(f"data: {text}"))
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    finally:
        stop_ranks()
    unusable = sorted(measured for measured, value in probe.means.items() if not math.isfinite(value))
    if unusable:
        raise ConfigError(f"{name}: not finite: {', '.join(unusable)}. Its weights, or the logits they lead to, are of no use; write another checkpoint.")
    own_start = start is None and subject.checkpoint is None
    sentences = verdict(probe, subject.config)
    console.print(describe(name, data, probe, subject.config))
    console.print(table(probe, own_start))
    console.print("\n".join(sentences))
    if out is not None:
        out.mkdir()
        write_rows(probe, out / "rows.parquet")
        draw(probe, own_start, out / "probe.png", title=f"{name}: {len(probe.panel)} positions of {data}")
        settings = {section: values for section, values in asdict(subject.config).items() if section in ("model", "data", "position", "thought", "target", "evaluation", "engine")}
        content = {"checkpoint": name, "start": start, "settings": settings, "means": probe.means, "intervals": probe.intervals, "verdict": sentences}
        (out / "probe.json").write_text(json.dumps(content, indent=1, allow_nan=False))
        console.print(f"written to {out}: probe.json, rows.parquet, probe.png")


def describe(name: str, data: str, probe: Probe, config: Config) -> str:
    """What was probed, in two lines."""
    thought, position = config.thought, config.position
    where = f"after {position.marker!r}" if position.marker else "drawn uniformly"
    return (f"{name} on {data}: {len(probe.panel)} positions {where} in {len(probe.panel.documents)} documents, horizon {config.target.horizon}\n"
            f"{config.evaluation.thoughts_per_position} thoughts each between {thought.open_marker!r} and {thought.close_marker!r}, at most {thought.max_thought_tokens} tokens, temperature {thought.temperature:g}\n")


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
            shown.add_row(words, f"{probe.means[name]:{sign}.3f}", f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}" if interval else "", EVALUATION[name].unit)
    return shown


def verdict(probe: Probe, config: Config) -> list[str]:
    """Whether there is signal, what the thoughts are worth, and what usually helps where there is none."""
    sentences = [_signal(probe), _worth(probe), *_cautions(probe)]
    return [sentence for sentence in sentences if sentence] + ([] if has_signal(probe) else _advice(probe, config))


def has_signal(probe: Probe) -> bool:
    """Whether thoughts predict their own targets better than those of another document do, and siblings differ."""
    low, _ = probe.intervals.get("gain_over_shuffled_nats", (0.0, 0.0))
    return low > 0 and probe.means.get("reward_group_std_nats", 0.0) > FLAT_GROUP_NATS


def _signal(probe: Probe) -> str:
    if "gain_over_shuffled_nats" not in probe.intervals:
        return "No verdict: the panel holds one document, so there are no intervals and no thoughts of another document. Give it more documents."
    if "reward_group_std_nats" not in probe.means:
        return "No verdict: one thought at each position has no siblings to be compared with. Write evaluation.thoughts_per_position=4."
    gain, spread = probe.means["gain_over_shuffled_nats"], probe.means["reward_group_std_nats"]
    low, high = probe.intervals["gain_over_shuffled_nats"]
    if spread <= FLAT_GROUP_NATS:
        return f"NO SIGNAL: the thoughts of a position all predict alike (spread {spread:.2g} nats), so every advantage is 0."
    if low > 0:
        return f"SIGNAL: a thought predicts its own target {gain:.3f} nats better than the thoughts of another document do, and siblings differ by {spread:.3f} nats: there is something to select."
    if high < 0:
        return f"NO SIGNAL: the thoughts of another document predict {-gain:.3f} nats better than a position's own."
    return f"NO SIGNAL: a thought can not be told from the thoughts of another document ({gain:+.3f} nats, interval {low:+.3f} to {high:+.3f}). Siblings differ by {spread:.3f} nats, by chance as far as this panel can see."


def _worth(probe: Probe) -> str:
    means = probe.means
    low, high = probe.intervals.get("gain_over_no_think_nats", (-math.inf, math.inf))
    effect = "helps" if low > 0 else "harms" if high < 0 else "neither clearly helps nor harms"
    return (f"Thinking {effect}: {means['gain_over_no_think_nats']:+.3f} nats against no thought and {means['gain_over_empty_nats']:+.3f} against an empty one; "
            f"a gain at {means['positive_gain_frac']:.0%} of the positions.")


def _cautions(probe: Probe) -> list[str]:
    means, sentences = probe.means, []
    correlation = means.get("reward_length_correlation", 0.0)
    low, high = probe.intervals.get("reward_length_correlation", (0.0, 0.0))
    if abs(correlation) > 0.1 and (low > 0 or high < 0):
        sentences.append(f"{'Longer' if correlation > 0 else 'Shorter'} thoughts predict better (correlation {correlation:+.2f}): the first updates will {'lengthen' if correlation > 0 else 'shorten'} thoughts.")
    if means["thought_truncated_frac"] > 0.5:
        sentences.append(f"{means['thought_truncated_frac']:.0%} of the thoughts were left unclosed and closed by force: the model does not end its thoughts within the budget.")
    if means["thought_empty_frac"] > 0.5:
        sentences.append(f"{means['thought_empty_frac']:.0%} of the thoughts are empty.")
    return sentences


def _advice(probe: Probe, config: Config) -> list[str]:
    """In the order of what it costs to try."""
    lines = ["What usually helps:"]
    if probe.means.get("reward_group_std_nats", 0.0) > FLAT_GROUP_NATS and probe.means.get("gain_over_shuffled_nats", 0.0) > 0:
        lines.append(f"  a larger panel, if the signal is only small: evaluation.panel_positions={4 * config.evaluation.panel_positions}")
    if config.position.selector != "marker":
        lines.append("  positions where a thought can matter, such as those before an answer: position.selector=marker position.marker=TEXT")
    if config.target.horizon == 1:
        lines.append("  a longer horizon, so that the reward is not the luck of one token: target.horizon=16")
    if config.thought.max_thought_tokens < 2048:
        lines.append("  a larger budget on real text: thought.max_thought_tokens=2048; budgets of 64 to 512 tokens did harm in the paper (Table S.1)")
    return lines + ["  a warm start: train first on documents with thoughts between the markers, then probe again"]


def write_rows(probe: Probe, path: Path) -> None:
    """One row a position as Parquet: where it is, every token as its id, what each thought led to, and all columns."""
    positions, ids = probe.panel.positions, pyarrow.list_(pyarrow.int64())
    documents = [probe.panel.documents[d] for d in positions.document]
    columns = {
        "document": pyarrow.array([document.id for document in documents]), "position": pyarrow.array(positions.position),
        "prefix_tokens": pyarrow.array([document.tokens[:t] for document, t in zip(documents, positions.position)], ids),
        "target_tokens": pyarrow.array(list(positions.target), ids),
        "thought_tokens": pyarrow.array(probe.thoughts.tokens, pyarrow.list_(ids)), "thought_truncated": pyarrow.array(list(probe.thoughts.truncated)),
        "thought_logprob_nats": pyarrow.array(list(probe.reasoned_logprob))}
    parquet.write_table(pyarrow.table(columns | {name: pyarrow.array(values) for name, values in probe.columns.items()}), path)


def draw(probe: Probe, own_start: bool, path: Path, *, title: str) -> None:
    """The gains with their intervals, and how the gains of single positions are spread."""
    from matplotlib.figure import Figure

    names = [name for name in GAINS if name in probe.means and not (own_start and name == "gain_over_start_nats")]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    bars, spread = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for y, name in enumerate(names):
        low, high = probe.intervals.get(name, (probe.means[name],) * 2)
        bars.barh(y, probe.means[name], height=0.6, color=COLORS[y], alpha=0.8)
        bars.plot([low, high], [y, y], color="black", linewidth=1.5)
    bars.set_yticks(range(len(names)), [TABLE[name] for name in names])
    bars.invert_yaxis()
    bars.set_xlabel("nats, with 95 % intervals")
    shown = [name for name in ("gain_over_no_think_nats", "gain_over_shuffled_nats") if name in probe.columns]
    ends = [min(probe.columns[name].min() for name in shown), max(probe.columns[name].max() for name in shown)]
    for name in shown:
        spread.hist(probe.columns[name], bins=30, range=ends, histtype="stepfilled", alpha=0.4, color=COLORS[names.index(name)])
    spread.set_xlabel("gain at a position, nats")
    spread.set_ylabel("positions")
    for axes in (bars, spread):
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a name may hold dollar signs
    figure.savefig(path, dpi=130)

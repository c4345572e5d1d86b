"""One page about one or several runs: what they were, what they gained, what the thoughts say.

Reads run folders, finished or not, and writes a single HTML file that needs nothing else, neither
a server nor a network. What a model or a document wrote is hostile until shown otherwise: it is
escaped by the template, and its control characters are spelled out.
"""

import base64
import io
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from omegaconf import DictConfig, OmegaConf

from rlp.metrics import EVALUATION, METRICS
from rlp.run_folder import DamagedFileError, RunFolder, open_run_folder, read_json, read_json_lines, write_atomically

GENERATOR = '<meta name="generator" content="rlp report">'
"""In the head of every report, so that a report can be told from a file that somebody wrote."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers too."""
LINES = ("-", "--", ":")

BEFORE_AFTER = {
    "gain_over_start_nats": "Gain over the start",
    "gain_over_ema_nats": "Gain over the EMA",
    "gain_over_no_think_nats": "Gain over its own no-think",
    "positive_gain_frac": "Positions with a positive gain",
    "accuracy_with_thought": "Accuracy with a thought",
    "accuracy_without_thought": "Accuracy without",
    "thought_tokens_mean": "Thought length",
    "panel_positions": "Positions",
}

THOUGHTS_SHOWN = 3
"""Most helpful thoughts of a step, and as many least helpful ones."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One small figure: curves over steps, from `metrics.jsonl` or `evaluation.jsonl`."""

    title: str
    unit: str
    names: tuple[str, ...]
    labels: tuple[str, ...] = ("",)


PLOTS = (
    Plot("Gain on held-out positions", "nats", ("gain_over_start_nats", "gain_over_ema_nats"), ("over the start", "over the EMA")),
    Plot("Accuracy on held-out positions", "fraction", ("accuracy_with_thought", "accuracy_without_thought"), ("with a thought", "without")),
    Plot("Reward", "nats", ("reward/mean",)),
    Plot("Thoughts with a positive reward", "fraction", ("reward/positive_frac",)),
    Plot("Thought length", "tokens", ("thought/tokens_mean",)),
    Plot("Truncated thoughts", "fraction", ("thought/truncated_frac",)),
    Plot("Entropy of thought tokens", "nats per token", ("policy/entropy",)),
    Plot("Gradient norm", "", ("optim/grad_norm",)),
    Plot("Next-token loss on documents", "nats per token", ("lm/loss",)),
)


@dataclass(frozen=True, slots=True)
class Run:
    """All that a run folder holds for a report. What the run has not written yet is empty or None."""

    label: str
    color: str
    config_text: str
    config: DictConfig
    """Read without its rules: the config of a run may be older than they are."""
    environment: dict | None
    metrics: list[dict]
    evaluation: list[dict]
    thoughts: list[dict]
    ledger: dict | None
    summary: dict | None

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


def write_report(run_folders: list[Path], out: Path) -> None:
    """Write one self-contained HTML page about the runs, over whatever is at `out`.

    Raises:
        ConfigError: a path that is no run folder.
        DamagedFileError: a file of a run that can not be read.
    """
    if not run_folders:
        raise ValueError("write_report needs at least one run folder, got none.")
    folders = [open_run_folder(path) for path in run_folders]
    names = [folder.name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder.path) for folder in folders]
    runs = [_read_run(folder, label, COLORS[i % len(COLORS)]) for i, (folder, label) in enumerate(zip(folders, labels))]
    write_atomically(Path(out), _render(runs).encode())


def is_report(path: Path) -> bool:
    """Whether a file was written by `write_report`."""
    with open(path, "rb") as file:
        return GENERATOR.encode() in file.read(2000)


def visible_text(text: str) -> str:
    """Text with its control characters spelled out (`\\x1b`), all but line ends and tabs.

    Terminal escapes, invisible characters, reversals of the writing direction and unpaired
    surrogates do nothing this way, and can still be seen.
    """
    return "".join(_spelled(character) if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t" else character for character in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _read_run(folder: RunFolder, label: str, color: str) -> Run:
    config_text = folder.config_yaml.read_text(encoding="utf-8")
    return Run(
        label=label,
        color=color,
        config_text=config_text,
        config=_parsed(config_text, folder.config_yaml),
        environment=_json_if_any(folder.environment_json),
        metrics=_lines_if_any(folder.metrics_jsonl),
        evaluation=_lines_if_any(folder.evaluation_jsonl),
        thoughts=_lines_if_any(folder.thoughts_jsonl),
        ledger=_json_if_any(folder.ledger_json),
        summary=_json_if_any(folder.summary_json),
    )


def _parsed(config_text: str, path: Path) -> DictConfig:
    try:
        config = OmegaConf.create(config_text)
    except yaml.YAMLError as error:
        raise DamagedFileError(f"{path} is not YAML: {error}") from error
    if not OmegaConf.is_dict(config):
        raise DamagedFileError(f"{path} must hold sections such as `model:` and `data:`, got {config_text[:80]!r}.")
    return config


def _json_if_any(path: Path) -> dict | None:
    return read_json(path) if path.exists() else None


def _lines_if_any(path: Path) -> list[dict]:
    return read_json_lines(path) if path.exists() else []


def _render(runs: list[Run]) -> str:
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
                                   trim_blocks=True, lstrip_blocks=True)
    templates.filters["visible"] = visible_text
    return templates.get_template("report.html.j2").render(
        generator=Markup(GENERATOR),
        runs=runs,
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs",
        facts=_facts_table(runs),
        panels=[_before_after(run) for run in runs],
        plots=_plots(runs),
        ledgers=[_ledger_table(run) for run in runs],
        thoughts=[_thought_columns(run) for run in runs],
        environments=[_environment_rows(run) for run in runs],
        definitions=[(name, *METRICS[name]) for name in METRICS] + [(name, *EVALUATION[name]) for name in EVALUATION],
    )


def _facts_table(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Rows of (what, one cell per run)."""
    facts = [_facts(run) for run in runs]
    return [(what, [fact[what] for fact in facts]) for what in facts[0]]


def _facts(run: Run) -> dict[str, str]:
    machine = run.environment or {}

    def setting(key: str) -> str:
        value = OmegaConf.select(run.config, key, default="-")
        return ", ".join(value) if OmegaConf.is_list(value) else str(value)

    return {
        "Status": _status(run),
        "Model": setting("model.path") + (", random initialization" if setting("model.init") == "random" else ""),
        "Data": setting("data.train"),
        "Loss weights": ", ".join(f"{term} {setting(f'objective.{term}_weight')}" for term in ("policy", "lm", "predictor", "kl")),
        "Thoughts": f"{setting('thought.group_size')} per position, up to {setting('thought.max_thought_tokens')} tokens, temperature {setting('thought.temperature')}",
        "Baseline": setting("baseline.kind") + (f", decay {setting('baseline.ema_decay')}" if setting("baseline.kind") == "ema" else ""),
        "Batch": f"{setting('optim.batch_size')} documents, positions in each: {setting('position.per_document')}, learning rate {setting('optim.learning_rate')}",
        "Seed": setting("run.seed"),
        "Cost": _cost(run),
        "Started": machine.get("date", "-").replace("T", " ").replace("+00:00", " UTC"),
        "Commit": _commit(machine),
        "Hardware": _hardware(machine),
    }


def _status(run: Run) -> str:
    if run.summary is None:
        return f"unfinished, at step {run.last_step}"
    return f"finished, {run.summary.get('steps', run.last_step)} steps"


def _cost(run: Run) -> str:
    totals = run.summary or run.ledger
    if totals is None:
        return "-"
    return f"{duration(totals.get('seconds'))}, {number(totals.get('flops'), '.3g')} FLOPs"


def _commit(machine: dict) -> str:
    commit = machine.get("commit")
    return "-" if commit is None else commit[:10] + (", with uncommitted changes" if machine.get("dirty") else "")


def _hardware(machine: dict) -> str:
    if not machine:
        return "-"
    devices = machine["devices"]
    gpus = [f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices) if name != "cpu"]
    return ", ".join(gpus) or f"{machine['cpu']}, {machine['cores']} cores, ranks: {machine['world_size']}"


def number(value: float | None, form: str) -> str:
    """A number as a table shows it; a dash where there is none."""
    return "-" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


_FORMS = {"nats": ".4f", "fraction": ".3f", "tokens": ".1f", "positions": ",.0f"}


def _before_after(run: Run) -> dict:
    """The panel of one run before and after; of an unfinished run, before and latest."""
    if run.summary is not None:
        before, after, later = run.summary.get("before") or {}, run.summary.get("after") or {}, "after"
    else:
        first_and_last = (run.evaluation[0], run.evaluation[-1]) if run.evaluation else ({}, {})
        before, after = first_and_last
        later = f"step {after.get('step', '-')}"
    rows = [_before_after_row(name, before.get(name), after.get(name)) for name in BEFORE_AFTER]
    return {"label": run.label, "color": run.color, "later": later, "rows": rows if before or after else []}


def _before_after_row(name: str, before: float | None, after: float | None) -> tuple[str, str, str, str, str, str]:
    """(what, unit, definition, before, after, change)."""
    unit, definition = EVALUATION[name]
    sign = "+" if name.startswith("gain") else ""
    change = "" if before is None or after is None or name == "panel_positions" else number(after - before, "+" + _FORMS[unit])
    return BEFORE_AFTER[name], unit, definition, number(before, sign + _FORMS[unit]), number(after, sign + _FORMS[unit]), change


def _plots(runs: list[Run]) -> list[dict]:
    """Each plot for which some run has numbers, as a picture that the page carries."""
    drawn = []
    for plot in PLOTS:
        curves = {(i, j): _curve(run, name) for i, run in enumerate(runs) for j, name in enumerate(plot.names)}
        if any(len(steps) for steps, _ in curves.values()):
            drawn.append({"title": plot.title, "unit": plot.unit, "source": _draw(plot, runs, curves)})
    return drawn


def _curve(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) where the metric was measured."""
    lines = run.metrics if name in METRICS else run.evaluation
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = zip(*points) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


_RC = {"font.size": 9, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999",
       "axes.grid": True, "grid.color": "#e8e8e8", "axes.axisbelow": True, "xtick.color": "#555555", "ytick.color": "#555555",
       "svg.hashsalt": "rlp report"}


def _draw(plot: Plot, runs: list[Run], curves: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]) -> str:
    """The plot as a data URL. One run has a color per quantity; several have a color per run and a dash per quantity."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(4.4, 2.6))
        # One frame for all plots, so that their axes line up on the page; a fitted layout draws everything twice.
        axes = figure.add_axes((0.13, 0.17, 0.84, 0.79))
        for (i, j), (steps, values) in curves.items():
            color = runs[i].color if len(runs) > 1 else COLORS[j]
            _draw_curve(axes, steps, values, color=color, line=LINES[j], markers=plot.names[j] in EVALUATION)
        if plot.unit.startswith("nats") and axes.get_ylim()[0] < 0 < axes.get_ylim()[1]:
            axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step", color="#555555")
        if len(plot.names) > 1:
            keys = [Line2D([], [], linestyle=LINES[j], color=COLORS[j] if len(runs) == 1 else "#555555") for j in range(len(plot.names))]
            axes.legend(keys, plot.labels, frameon=False, fontsize=8, loc="best")
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()


def _draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, *, color: str, line: str, markers: bool) -> None:
    """Evaluations as they are; steps thin, with the mean of their neighbours over them."""
    if markers or len(steps) < 20:
        axes.plot(steps, values, line, color=color, marker="o", markersize=3, linewidth=1.6)
        return
    axes.plot(steps, values, line, color=color, linewidth=0.7, alpha=0.35)
    axes.plot(steps, neighbour_mean(values), line, color=color, linewidth=1.8)


def neighbour_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, 1/40 of the curve on either side, fewer at the ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _ledger_table(run: Run) -> dict:
    ledger = run.ledger or {"phases": {}}
    total = ledger.get("flops") or math.nan
    rows = [(phase, f"{count['tokens_in']:,}", f"{count['tokens_generated']:,}", f"{count['tokens_trained']:,}", f"{count['flops']:.3g}",
             "-" if math.isnan(total) else f"{count['flops'] / total:.0%}", duration(count["seconds"])) for phase, count in ledger["phases"].items()]
    return {"label": run.label, "color": run.color, "rows": rows, "flops": number(ledger.get("flops"), ".3g"),
            "paper_flops": number(ledger.get("paper_flops"), ".3g"), "seconds": duration(ledger.get("seconds"))}


def _thought_columns(run: Run) -> dict:
    """The first and the last step with logged thoughts, side by side."""
    steps = sorted({thought["step"] for thought in run.thoughts})
    ends = steps if len(steps) < 2 else [steps[0], steps[-1]]
    columns = [{"step": step, **_extremes([thought for thought in run.thoughts if thought["step"] == step])} for step in ends]
    return {"label": run.label, "color": run.color, "columns": columns}


def _extremes(thoughts: list[dict]) -> dict[str, list[dict]]:
    """Most and least helpful thoughts by reward, none of them twice; those whose reward was not measured are left out."""
    ranked = sorted((thought for thought in thoughts if thought.get("reward") is not None), key=lambda thought: -thought["reward"])
    num_best, num_worst = min(THOUGHTS_SHOWN, (len(ranked) + 1) // 2), min(THOUGHTS_SHOWN, len(ranked) // 2)
    return {"best": ranked[:num_best], "worst": ranked[::-1][:num_worst]}


def _environment_rows(run: Run) -> list[tuple[str, str]]:
    return [(name, _plain(value)) for name, value in (run.environment or {}).items()]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner or 'not installed'}" for name, inner in value.items())
    return ", ".join(value) if isinstance(value, list) else "-" if value is None else str(value)

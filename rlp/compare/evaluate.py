"""The command `rlp eval`: the accuracy of a checkpoint on benchmarks, as a table and as files."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rlp.compare.asked_model import open_asked_model
from rlp.compare.benchmarks import Result, run_benchmarks
from rlp.compare.gain import METHOD, ThoughtGain, thought_gain
from rlp.compare.tasks import Benchmark, load_tasks, versions
from rlp.config import ConfigError
from rlp.process.console import visible_text
from rlp.process.files import append, refuse_existing, write_new
from rlp.process.run_folder import open_run_folder

TABLE_COLUMNS = 110
"""Of the terminal at least: a folded table can not be read."""


def evaluate_checkpoint(
    checkpoint: str,
    benchmarks: dict[str, Benchmark],
    *,
    modes: tuple[str, ...],
    limit: int | None,
    seed: int,
    batch_size: int,
    device: str,
    dtype: str,
    results_file: Path | None,
    rows_file: Path | None,
) -> None:
    """Ask a checkpoint all benchmarks, print what it scored, and write it where a file is given.

    Args:
        checkpoint: a Hugging Face folder, a Hub name, or a run folder, whose export is meant.
        modes: `think`, `no_think`, or both.
        limit: questions of each task at most.
        batch_size: sequences decoded side by side.
        device: `auto`, or as torch names it.
        results_file: gets results and settings, as JSON.
        rows_file: gets every thought and answer, a JSON object a line.

    Raises:
        ConfigError, DataError: something that is named is not there or can not be used.
    """
    checkpoint, chosen_device, console = model_of(checkpoint), device_of(device), _wide_console()
    tasks = load_tasks(benchmarks)
    model = open_asked_model(checkpoint, device=chosen_device, dtype=dtype)
    for note in model.marker_notes():
        console.print(visible_text(note))

    results, rows = [], {}
    asked = run_benchmarks(
        benchmarks, tasks, model, modes=modes, limit=limit, seed=seed, rows=batch_size
    )
    for result, said in asked:
        results.append(result)
        rows[result.benchmark, result.mode] = said
        console.print(
            f"{result.benchmark} {result.mode}: {result.questions} questions, {result.metric},"
            f" {result.seconds:.0f} s",
            style="dim",
        )
        if rows_file is not None:
            _append_rows(rows_file, said)

    gains = {}
    if len(modes) == 2:
        for name in benchmarks:
            gains[name] = thought_gain(rows[name, "think"], rows[name, "no_think"])
    console.print(_result_table(results, gains))
    for name, gain in gains.items():
        console.print(f"{name}: {gain.verdict}.")
    if results_file is not None:
        settings = {"checkpoint": checkpoint, "seed": seed, "limit": limit}
        _write_results(results_file, settings, benchmarks, results, gains)


def _wide_console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, TABLE_COLUMNS)
    return console


def _append_rows(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    append(path, "".join(lines).encode(), point="eval.torn_rows")


def _write_results(
    path: Path,
    settings: dict[str, object],
    benchmarks: dict[str, Benchmark],
    results: list[Result],
    gains: dict[str, ThoughtGain],
) -> None:
    content = settings | {
        "versions": versions(),
        "benchmarks": {name: asdict(benchmark) for name, benchmark in benchmarks.items()},
        "results": [asdict(result) for result in results],
        "thought_gain": {
            name: {
                "accuracy": gain.mean,
                "standard_error": gain.standard_error,
                "low": gain.low,
                "high": gain.high,
                "interval": METHOD,
                "verdict": gain.verdict,
            }
            for name, gain in gains.items()
        },
    }
    text = json.dumps(content, indent=2) + "\n"
    write_new(path, text.encode(), point="eval.torn_json")


def benchmarks_by_name(
    tasks: str, *, question_field: str, answer_field: str, examples: str | None
) -> dict[str, Benchmark]:
    """The benchmarks that a list of names and files means.

    Args:
        tasks: tasks of lm_eval, and .jsonl files of questions, with commas between them.
        question_field, answer_field: of the files.
        examples: a file of the same fields, for few-shot examples.

    Raises:
        ConfigError: none is named, or two have one name.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError(
            "--tasks names no task. Write --tasks gsm8k, or the path of a .jsonl file."
        )
    if len({Path(name).stem for name in names}) < len(names):
        raise ConfigError(
            f"--tasks {tasks}: two of them have one name. Write a YAML file of"
            " benchmarks, where each has its own, and --config."
        )

    benchmarks = {}
    for name in names:
        if name.endswith(".jsonl"):
            benchmarks[Path(name).stem] = Benchmark(
                data=name,
                prompt=f"Question: {{{{{question_field}}}}}\nAnswer:",
                reference=f"{{{{{answer_field}}}}}",
                examples=examples,
            )
        else:
            benchmarks[name] = Benchmark(task=name)
    return benchmarks


def refuse_output(flag: str, path: Path | None) -> None:
    """Before any work: a file that can not be written at the end, or that would be written over."""
    if path is None:
        return
    refuse_existing(path, flag)
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"{flag} {path}: there is no folder {path.parent}. Make it, or write another path."
        )


def model_of(name: str) -> str:
    """The model folder or Hub name that a command line means; of a run folder its export. Looked at
    before anything is asked or loaded."""
    path = Path(name)
    if (path / "meta.json").is_file():
        raise ConfigError(
            f"{path} is a checkpoint of a run, which becomes a model by: rlp export {path} --out"
            " FOLDER"
        )
    if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
        means_a_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if means_a_path and not path.exists():
            raise ConfigError(
                f"no folder at {name}. Write a folder that holds a Hugging Face model, such as"
                " runs/NAME/export, or a Hub name."
            )
        return name

    export = open_run_folder(path).export
    if not export.is_dir():
        raise ConfigError(
            f"{path} is a run folder that has no export: its run has not ended. Make a model of a"
            f" checkpoint first: rlp export {path} --step newest --out FOLDER"
        )
    print(f"{path} is a run folder; what is evaluated is its export, {export}")
    return str(export)


def device_of(name: str) -> torch.device:
    """What `--device` names; of `auto` the GPU where there is one.

    Raises:
        ConfigError: torch knows no such device, or there is none here.
    """
    has_gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu") and not has_gpu:
        raise ConfigError(f"--device {name}: torch sees no GPU here. Write --device cpu.")
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"--device {name}: torch knows no such device. Write auto, cpu or cuda."
        ) from error


def _percent(mean: float, error: float | None) -> str:
    spread = "" if error is None else f" +- {100 * error:.2f}"
    return f"{100 * mean:.2f}{spread}"


def _result_table(results: list[Result], gains: dict[str, ThoughtGain]) -> Table:
    """pass@1 and its standard error in percent; tokens of a thought and of an answer, and the
    percentage that the budget ended; answers that the check could not read (percent), did not
    finish in time, or died of."""
    columns = ("benchmark", "mode", "asked", "pass@1 %", "thought", "cut %", "answer", "cut %")
    table = Table(*columns, "unread %", "late", "died", box=None, pad_edge=False)
    for result in results:
        table.add_row(
            result.benchmark,
            result.mode,
            f"{result.questions} x {result.samples}",
            _percent(result.accuracy, result.standard_error),
            f"{result.thought_tokens_mean:.1f}",
            f"{100 * result.thought_truncated_frac:.0f}",
            f"{result.answer_tokens_mean:.1f}",
            f"{100 * result.answer_truncated_frac:.0f}",
            f"{100 * result.unparseable_frac:.0f}",
            str(result.check_timeouts),
            str(result.check_crashes),
        )
    for name, gain in gains.items():
        table.add_row(name, "difference", "", _percent(gain.mean, gain.standard_error))
    return table

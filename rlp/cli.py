"""The console script `rlp`: look at runs that exist. Runs are started by `train.py`.

    rlp view RUN        its logged thoughts, in the terminal
    rlp report RUN...   one HTML page about one or several runs
    rlp export STEP     a checkpoint as a Hugging Face folder

Exit codes: 0 done, 2 something that the command line names is not there, 3 a file that can not be read back.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlp.config import ConfigError
from rlp.report import is_report, visible_text, write_report
from rlp.run_folder import DamagedFileError, RunFolder, open_run_folder, read_json_lines


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except ConfigError as error:
        print(f"rlp: {error}", file=sys.stderr)
        return 2
    except DamagedFileError as error:
        print(f"rlp: {error}", file=sys.stderr)
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlp", description="Look at runs of RLP, reinforcement as a pretraining objective.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_view(commands)
    _add_report(commands)
    _add_export(commands)
    return parser


def _add_view(commands: argparse._SubParsersAction) -> None:
    view = commands.add_parser("view", help="print the thoughts that a run logged")
    view.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    view.add_argument("--step", type=int, metavar="N", help="only those of step N")
    view.add_argument("--sort", choices=("step", "best", "worst"), default="step", help="as logged (the default), or by reward")
    view.add_argument("--search", metavar="TEXT", help="only those with TEXT in prefix, thought or target, in any case")
    view.add_argument("--limit", type=int, default=20, metavar="N", help="at most N (20); 0 prints all")
    view.set_defaults(command=view_thoughts)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="write an HTML page about one or several runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run folder; needed for several runs")
    report.set_defaults(command=report_runs)


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder, with float32 weights")
    export.add_argument("checkpoint", type=Path, metavar="STEP", help="a checkpoint, such as runs/NAME/checkpoints/step_100")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    export.set_defaults(command=export_step)


def export_step(arguments: argparse.Namespace) -> int:
    """`rlp export`."""
    from rlp.checkpoint import CheckpointError, open_checkpoint  # they load transformers, which the other commands do without
    from rlp.export import export_checkpoint

    try:
        export_checkpoint(open_checkpoint(arguments.checkpoint), arguments.out)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    print(arguments.out)
    return 0


def view_thoughts(arguments: argparse.Namespace) -> int:
    """`rlp view`."""
    folder = open_run_folder(arguments.run)
    thoughts = _logged_thoughts(folder)
    if arguments.step is not None:
        thoughts = _of_step(thoughts, arguments.step, folder)
    if arguments.search is not None:
        thoughts = [thought for thought in thoughts if _mentions(thought, arguments.search)]
    thoughts = _sorted(thoughts, arguments.sort)
    console = Console(highlight=False, markup=False, emoji=False)
    shown = thoughts[: arguments.limit] if arguments.limit > 0 else thoughts
    for thought in shown:
        console.print(_as_text(thought), end="\n\n")
    console.print(Text(f"{len(shown)} of {len(thoughts)} thoughts", style="dim"))
    return 0


def _logged_thoughts(folder: RunFolder) -> list[dict]:
    if not folder.thoughts_jsonl.exists():
        raise ConfigError(f"{folder.path} has no thoughts.jsonl: the run has logged no thoughts. "
                          "They come every logging.every_n_steps steps, unless logging.thoughts is 0 or no term of the loss thinks.")
    return read_json_lines(folder.thoughts_jsonl)


def _of_step(thoughts: list[dict], step: int, folder: RunFolder) -> list[dict]:
    chosen = [thought for thought in thoughts if thought["step"] == step]
    if not chosen:
        steps = sorted({thought["step"] for thought in thoughts})
        nearest = sorted(sorted(steps, key=lambda logged: abs(logged - step))[:5])
        raise ConfigError(f"{folder.path} logged no thoughts at step {step}. Write --step with a logged one, such as {', '.join(map(str, nearest)) or 'none yet'}.")
    return chosen


def _mentions(thought: dict, text: str) -> bool:
    return any(text.casefold() in thought[part].casefold() for part in ("prefix_tail", "thought", "target"))


def _sorted(thoughts: list[dict], order: str) -> list[dict]:
    """By reward, stable; thoughts whose reward was not measured come last."""
    if order == "step":
        return sorted(thoughts, key=lambda thought: thought["step"])
    sign = -1 if order == "best" else 1
    unmeasured = float("inf")
    return sorted(thoughts, key=lambda thought: unmeasured if thought.get("reward") is None else sign * thought["reward"])


def _as_text(thought: dict) -> Text:
    """One thought for the terminal. Text objects, so that markup that a model wrote stays text."""
    reward = thought.get("reward")
    truncated = ", truncated" if thought["truncated"] else ""
    gained = "reward not measured" if reward is None else f"reward {reward:+.4f} nats"
    color = "" if reward is None else "green" if reward > 0 else "red"
    return Text.assemble(
        (gained, f"bold {color}".strip()),
        (f"  step {thought['step']}, document {thought['document']}, position {thought['position']}, {thought['thought_tokens']} tokens{truncated}\n", "bold"),
        (visible_text(thought["prefix_tail"]), "dim"),
        ("\n  thought  ", "cyan"),
        visible_text(thought["thought"]),
        ("\n  next     ", "cyan"),
        (visible_text(thought["target"]), "bold"),
    )


def report_runs(arguments: argparse.Namespace) -> int:
    """`rlp report`."""
    folders = [open_run_folder(path) for path in arguments.runs]
    if arguments.out is None and len(folders) > 1:
        raise ConfigError(f"a report on {len(folders)} runs belongs to none of their folders. Write --out FILE.")
    out = arguments.out or folders[0].report_html
    _refuse_to_overwrite(out, folders)
    write_report(arguments.runs, out)
    print(out)
    return 0


def _refuse_to_overwrite(out: Path, folders: list[RunFolder]) -> None:
    """A report replaces reports; anything else that has its name stays."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}. Make it, or write another path.")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder. Write the path of a file, such as {out / 'report.html'}.")
    own = {folder.report_html.resolve() for folder in folders}
    if out.exists() and out.resolve() not in own and not is_report(out):
        raise ConfigError(f"--out {out} exists and is no report, so it is not written over. Write another path.")

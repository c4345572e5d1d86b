"""Logged thoughts read back: what each was worth, and the command `rlp view`, which prints them."""

import math

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rlp.config import ConfigError
from rlp.process.console import quoted_text, visible_text
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import read_json_lines


def view_thoughts(
    folder: RunFolder, *, step: int | None, order: str, search: str | None, limit: int
) -> None:
    """Print the thoughts that a run logged.

    Args:
        step: only those of this step; None for all.
        order: `step`, as logged, or `best` or `worst` first.
        search: only those with this text in prefix, thought or target, in any case.
        limit: at most so many; 0 for all.

    Raises:
        ConfigError: the run has logged none, or none at that step.
    """
    thoughts = _logged_thoughts(folder)
    if step is not None:
        thoughts = _of_step(thoughts, step, folder)
    if search is not None:
        thoughts = [thought for thought in thoughts if _mentions(thought, search)]
    thoughts = _sorted(thoughts, order)

    console = Console(highlight=False, markup=False, emoji=False)
    shown = thoughts[:limit] if limit > 0 else thoughts
    for thought in shown:
        console.print(_as_text(thought))
        console.print()
    console.print(Text(f"{len(shown)} of {len(thoughts)} thoughts", style="dim"))


def _logged_thoughts(folder: RunFolder) -> list[dict]:
    if not folder.thoughts_jsonl.exists():
        raise ConfigError(
            f"{folder.path} has no thoughts.jsonl: the run has logged no thoughts. They come every"
            " logging.every_n_steps steps, unless logging.thoughts is 0 or no term of the loss"
            " thinks."
        )
    return read_json_lines(folder.thoughts_jsonl)


def _of_step(thoughts: list[dict], step: int, folder: RunFolder) -> list[dict]:
    chosen = [thought for thought in thoughts if thought["step"] == step]
    if not chosen:
        steps = sorted({thought["step"] for thought in thoughts})
        nearest = sorted(sorted(steps, key=lambda logged: abs(logged - step))[:5])
        raise ConfigError(
            f"{folder.path} logged no thoughts at step {step}. Write --step with a logged one, such"
            f" as {', '.join(map(str, nearest)) or 'none yet'}."
        )
    return chosen


def _mentions(thought: dict, text: str) -> bool:
    parts = (thought[part].casefold() for part in ("prefix_tail", "thought", "target"))
    return any(text.casefold() in part for part in parts)


def _sorted(thoughts: list[dict], order: str) -> list[dict]:
    """By `worth_of`, stable; thoughts of which nothing was measured come last."""
    if order == "step":
        return sorted(thoughts, key=lambda thought: thought["step"])
    sign = -1 if order == "best" else 1

    def place(thought: dict) -> float:
        worth = worth_of(thought)
        return math.inf if worth is None else sign * worth

    return sorted(thoughts, key=place)


def _as_text(thought: dict) -> Group:
    """One thought for the terminal. Text objects, so that markup that a model wrote stays text;
    each in a column of its own, so that its line ends stay there."""
    is_blank = not thought["thought"].strip()
    shown = quoted_text(thought["thought"]) if is_blank else visible_text(thought["thought"])

    parts = Table.grid(padding=(0, 2, 0, 0))
    parts.add_column(no_wrap=True, style="cyan")
    parts.add_column(overflow="fold")
    parts.add_row("  context", Text(visible_text(thought["prefix_tail"]), "dim"))
    parts.add_row("  thought", Text(shown))
    if "prediction" in thought:
        parts.add_row("  said", Text(quoted_text(thought["prediction"])))
    parts.add_row("  next", Text(quoted_text(thought["target"]), "bold"))
    return Group(_numbers(thought), parts)


def _numbers(thought: dict) -> Text:
    """Where a thought stands, what it was rewarded for, and how probable the target was with it and
    without. What was not logged is left out."""
    reward = thought.get("reward")
    color = "" if reward is None else "green" if reward > 0 else "red"
    truncated = ", truncated" if thought["truncated"] else ""
    where = (
        f"  step {thought['step']}, document {thought['document']}, position"
        f" {thought['position']}, {thought['thought_tokens']} tokens{truncated}"
    )

    logprobs = []
    for key, words in (("reasoned_logprob", "with the thought"), ("baseline_logprob", "without")):
        if thought.get(key) is not None:
            logprobs.append(f"{thought[key]:.3f} {words}")
    return Text.assemble(
        (_reward_in_words(thought), f"bold {color}".strip()),
        (where, "bold"),
        f"\nlog p(next) {', '.join(logprobs)}" if logprobs else "",
    )


def _reward_in_words(thought: dict) -> str:
    reward, gain = thought.get("reward"), information_gain_of(thought)
    if reward is not None and gain == reward:
        return f"reward {reward:+.4f} nats"

    told = "reward not measured" if reward is None else f"reward {reward:+.4f}"
    if reward is None and thought.get("advantage") is not None:
        told += f", advantage {thought['advantage']:+.4f}"
    if gain is not None:
        told += f", information gain {gain:+.4f} nats"
    return told


def information_gain_of(thought: dict) -> float | None:
    """How much a logged thought raised the log-probability of its target, in nats: the reward of
    RLP, and not that of other rewards; None where it was not measured."""
    reasoned, baseline = thought.get("reasoned_logprob"), thought.get("baseline_logprob")
    derived = None if reasoned is None or baseline is None else reasoned - baseline
    reward = thought.get("reward")
    if derived is not None and reward is not None:
        # Written as float32 differences: the two roundings of one number are one number.
        if math.isclose(derived, reward, rel_tol=1e-4, abs_tol=1e-5):
            return reward
    return thought.get("gain", derived)


def worth_of(thought: dict) -> float | None:
    """What a thought was worth: its reward; on a step that did not measure it, its advantage over
    its siblings."""
    reward = thought.get("reward")
    return thought.get("advantage") if reward is None else reward

"""What is drawn: stages of a real model, with and without the chat template, at four temperatures.

A cell is one such way to draw: answers to a third of the committed panel's open prompts and half of
its closed ones, and many answers to three of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rlp.post.diversity_drawing import Drawing, draw_answers
from rlp.post.diversity_samples import Prompt, committed_panel

STAGES = {
    "plain": "model",
    "warm": "warm/export",
    "calibrated": "calibrated/export",
    "rlp": "arms/rlp/seed_0/run/export",
}
"""What `experiments/smollm2` leaves behind, by stage: the model as it comes, after the warm start,
after the calibration, after RLP."""

FORMATS = ("chat", "raw")

TEMPERATURES = (0.7, 1.0, 1.5, 2.0)
"""Of the plain model; the stages are compared at `COMPARED`."""

COMPARED = 1.0

TOP_P = 0.9
"""As in arXiv 2510.22954."""

FOCUS = {
    "numbers": ("Pick a random number from 1 to 10. Answer with the number only.", 32),
    "metaphors": ("Write a metaphor about time.", 8),
    "advice": ("Give one piece of advice to a student before an examination.", 8),
}
"""Prompts of the panel that get more answers, and how many."""


def panel() -> list[Prompt]:
    """Every third open prompt, four of each category, and every second closed one."""
    prompts = committed_panel()
    by_kind = {kind: [one for one in prompts if one.kind == kind] for kind in ("open", "closed")}
    return [*by_kind["open"][::3], *by_kind["closed"][::2]]


def focus() -> list[Prompt]:
    """The prompts of `FOCUS`, in its order."""
    prompts = {prompt.text: prompt for prompt in committed_panel()}
    return [replace(prompts[text], samples=samples) for text, samples in FOCUS.values()]


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to draw."""

    stage: str
    format: str
    temperature: float

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.format}_{self.temperature:g}"

    def samples(self, folder: Path) -> Path:
        """Answers to the panel."""
        return folder / f"{self.name}.jsonl"

    def focus(self, folder: Path) -> Path:
        """Answers to the prompts of `FOCUS`."""
        return folder / f"{self.name}_focus.jsonl"

    def draw(self, models: Path, folder: Path) -> None:
        """What is missing of both files."""
        checkpoint = str(models / STAGES[self.stage])
        drawing = Drawing(
            open_samples=4,
            closed_samples=2,
            temperature=self.temperature,
            top_p=TOP_P,
            format=self.format,
        )
        draw_answers(checkpoint, panel(), drawing, self.samples(folder), name=self.stage)
        draw_answers(checkpoint, focus(), drawing, self.focus(folder), name=self.stage)


def cells() -> Iterator[Cell]:
    """All of them: the plain model by temperature, then the stages beside it."""
    for temperature in TEMPERATURES:
        for form in FORMATS:
            yield Cell("plain", form, temperature)
    for form in FORMATS:
        for stage in STAGES:
            if stage != "plain":
                yield Cell(stage, form, COMPARED)

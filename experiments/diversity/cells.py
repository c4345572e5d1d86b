"""What is drawn: stages of a real model, with and without the chat template, at four temperatures.

A cell is one file of samples: the committed panel, and three prompts of it many times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
"""Of the plain model; the stages are compared at 1."""

TOP_P = 0.9
"""As in arXiv 2510.22954."""

FOCUS = {
    "numbers": ("Pick a random number from 1 to 10. Answer with the number only.", 32),
    "metaphors": ("Write a metaphor about time.", 8),
    "advice": ("Give one piece of advice to a student before an examination.", 8),
}
"""Prompts of the panel that get more answers, and how many."""


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
        """What is missing of both files; seconds of CPU are the caller's to count."""
        checkpoint = str(models / STAGES[self.stage])
        drawing = Drawing(
            open_samples=4,
            closed_samples=2,
            temperature=self.temperature,
            top_p=TOP_P,
            format=self.format,
        )
        prompts = committed_panel()
        draw_answers(checkpoint, prompts, drawing, self.samples(folder), name=self.stage)
        for text, samples in FOCUS.values():
            prompt = next(one for one in prompts if one.text == text)
            more = Drawing(
                open_samples=samples,
                temperature=self.temperature,
                top_p=TOP_P,
                format=self.format,
            )
            draw_answers(checkpoint, [prompt], more, self.focus(folder), name=self.stage)


def cells() -> Iterator[Cell]:
    """All of them, those that most is asked of first."""
    for temperature in (1.0, 0.7):
        for form in FORMATS:
            yield Cell("plain", form, temperature)
    for stage in ("warm", "rlp", "calibrated"):
        for form in FORMATS:
            yield Cell(stage, form, 1.0)
    for temperature in (1.5, 2.0):
        for form in FORMATS:
            yield Cell("plain", form, temperature)


def focus_prompt(panel: list[Prompt], name: str) -> Prompt:
    """A prompt of `FOCUS` by its short name."""
    return next(one for one in panel if one.text == FOCUS[name][0])

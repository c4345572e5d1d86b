"""What a model is read on: held-out positions of three kinds, by the framework's own panel."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from rlp.config import Config, load_config
from rlp.measure.decomposition import Decomposition
from rlp.measure.frozen import load_frozen
from rlp.measure.panel import held_out_panel
from rlp.measure.panel_scoring import measure_panel
from rlp.measure.verdict import LEAST_DOCUMENTS
from rlp.model.setup import PanelSetup
from rlp.process.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Panel:
    """Where a model is read."""

    file: str
    overrides: tuple[str, ...] = ()
    """Of the config of the arms."""


UNIFORM = ("position.selector=uniform", "position.marker=null", "target.horizon=1")

PANELS = {
    "results": Panel("held_out.jsonl"),
    "solutions": Panel("solutions.jsonl", UNIFORM),
    "other_text": Panel("other_text.jsonl", UNIFORM),
}
"""results: where thoughts stand in training. solutions: any token of any held-out line, which is
what the paper's positions are. other_text: any token of text that is no part of the training."""

FIGURES = {
    "n": "panel_positions",
    "gain": "gain_over_no_think_nats",
    "gain_over_start": "gain_over_start_nats",
    "accuracy": "accuracy_with_thought",
    "accuracy_without": "accuracy_without_thought",
    "loss": "document_loss_nats",
    "best_of_g": "cross_selected_gain_nats",
    "surest_gain": "surest_thought_gain_nats",
    "surest_accuracy": "surest_thought_accuracy",
    "over_another": "gain_over_shuffled_nats",
    "thought_tokens": "thought_tokens_mean",
    "no_think": "no_think_logprob_nats",
}
"""By their names in results.jsonl, the panel's own (`EVALUATION` in rlp/measure/metrics.py)."""


Reading = tuple[str, tuple[int, int], float]
"""Panel; positions, and thoughts at each; temperature of the thoughts."""


def panel_config(
    config: Path, model: Path, data: Path, reading: Reading, overrides: tuple[str, ...] = ()
) -> Config:
    """The config that a model is read by.

    Args:
        config: of the arms.
        data: the folder of the documents.
    """
    panel, (positions, thoughts), temperature = reading
    return load_config(
        config,
        [
            *("run.dir=unused", f"model.path={model}", *PANELS[panel].overrides),
            f"data.held_out=[{data / PANELS[panel].file}]",
            f"evaluation.panel_positions={positions}",
            f"evaluation.thoughts_per_position={thoughts}",
            f"thought.temperature={temperature}",
            *overrides,
        ],
    )


def read_model(
    configs: list[Config], ranks: Ranks, starts: list[list[float] | None]
) -> list[tuple[Decomposition, float]]:
    """Read one model on several panels, or at several temperatures; what each said, and its
    seconds.

    Args:
        configs: of one model.
        starts: for each the log-probabilities of the arms' start without a thought (`no_think_of`);
            None where the model is the start.
    """
    setups = [PanelSetup(config, lambda text: None) for config in configs]
    loaded, found = load_frozen(setups[0], ranks), []
    for setup, start in zip(setups, starts):
        began = time.perf_counter()
        panel = held_out_panel(setup)
        # Temperature and horizon are of a reading, not of the weights.
        model = replace(loaded, thought_format=setup.thought_format)
        said = measure_panel(model, panel, setup.config, ranks, start_logprob=start)
        found.append((said, time.perf_counter() - began))
    return found


def no_think_of(found: Decomposition) -> list[float]:
    """[M] nats: the prediction without a thought, for `read_model` of what was trained from it."""
    return found.columns["no_think_logprob_nats"].tolist()


def figures(found: Decomposition) -> dict[str, float | None]:
    """What a line of results.jsonl says of a reading; null where it was not measured."""
    said: dict[str, float | None] = {
        name: found.means.get(measured) for name, measured in FIGURES.items()
    }
    for name in ("gain", "best_of_g"):
        low, high = found.intervals.get(FIGURES[name], (None, None))
        said |= {f"{name}_low": low, f"{name}_high": high}
    said["documents"] = len(found.panel.documents)
    said["group_size"] = found.reasoned_logprob.shape[1]
    said["closed_frac"] = 1 - found.means["thought_truncated_frac"]
    return said


def gate_in_words(line: dict) -> tuple[bool, str]:
    """Whether thoughts gain by a line of the gate, and why.

    It passes where the lower end of the 95 % interval of the mean gain is above 0, and that of the
    best of G too, chosen and scored on different halves of the target.
    """
    if line["documents"] < LEAST_DOCUMENTS:
        return False, (
            f"No verdict: the panel holds {line['documents']} documents, and one needs"
            f" {LEAST_DOCUMENTS}."
        )
    gain, best = ((line[name], line[f"{name}_low"]) for name in ("gain", "best_of_g"))
    passes = gain[1] > 0 and best[1] > 0
    ends, where = "from {:+.3f} on".format, f"{line['n']:g} positions"
    return passes, (
        f"The gate {'passes' if passes else 'fails'}: thoughts gain {gain[0]:+.3f} nats a token"
        f" over none (interval {ends(gain[1])}), and the best of {line['group_size']:g}"
        f" {best[0]:+.3f} ({ends(best[1])}), on {where} of {line['documents']:g} documents."
    )

"""The README's figure: gain and accuracy on held-out positions over the steps of a run, with
thoughts at both temperatures.

python experiments/world/plot.py runs/quickstart experiments/world/quickstart.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rlp.config import load_config
from rlp.measure.metrics import COLD
from rlp.process.run_folder import open_run_folder
from rlp.process.run_logs import read_json_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder with evaluations")
    parser.add_argument("out", help="a .png or .svg file")
    options = parser.parse_args()
    folder = open_run_folder(options.run)
    config = load_config(folder.config_yaml)
    lines = read_json_lines(folder.evaluation_jsonl)
    temperatures = {"": config.thought.temperature, COLD: config.evaluation.cold_temperature}

    figure, (gain, accuracy) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for prefix, style in (("", "o-"), (COLD, "s--")):
        if temperatures[prefix] is None:
            continue
        label = f"thoughts at T {temperatures[prefix]:g}"
        for axes, name in ((gain, "gain_over_start_nats"), (accuracy, "accuracy_with_thought")):
            draw(axes, lines, f"{prefix}{name}", style, "C0", label)
    draw(accuracy, lines, "accuracy_without_thought", "o:", "C1", "without a thought")
    gain.axhline(0, color="0.7", linewidth=0.8)
    gain.set(title="information gain over the starting checkpoint", xlabel="step", ylabel="nats")
    accuracy.set(title="next-token accuracy", xlabel="step", ylim=(0, 1.03))
    for axes in (gain, accuracy):
        axes.legend(frameon=False, loc="center right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, dpi=130)


def draw(axes: plt.Axes, lines: list[dict], name: str, style: str, color: str, label: str) -> None:
    """One number of the panel over the steps."""
    steps, values = zip(*[(line["step"], line[name]) for line in lines])
    axes.plot(steps, values, style, color=color, markersize=3, label=label)


if __name__ == "__main__":
    main()

"""The README's figure: gain and accuracy on held-out positions over the steps of a run.

python experiments/world/plot.py runs/quickstart experiments/world/quickstart.png
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rlp.process.run_folder import open_run_folder
from rlp.process.run_logs import read_json_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder with evaluations")
    parser.add_argument("out", help="a .png or .svg file")
    options = parser.parse_args()
    lines = read_json_lines(open_run_folder(options.run).evaluation_jsonl)
    steps = [line["step"] for line in lines]
    figure, (gain, accuracy) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    gain.plot(
        steps, [line["gain_over_start_nats"] for line in lines], "o-", color="C0", markersize=3
    )
    gain.axhline(0, color="0.7", linewidth=0.8)
    gain.set(title="information gain over the starting checkpoint", xlabel="step", ylabel="nats")
    accuracy.plot(
        steps,
        [line["accuracy_with_thought"] for line in lines],
        "o-",
        color="C0",
        markersize=3,
        label="with a thought",
    )
    accuracy.plot(
        steps,
        [line["accuracy_without_thought"] for line in lines],
        "o--",
        color="C1",
        markersize=3,
        label="without",
    )
    accuracy.set(title="next-token accuracy", xlabel="step", ylim=(0, 1.03))
    accuracy.legend(frameon=False, loc="center right")
    for axes in (gain, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()

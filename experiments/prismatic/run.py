"""Score every set under a proxy, train a student on it, and add a line to results.jsonl; goes on
where it was stopped.

    python experiments/prismatic/run.py --seeds 8
"""

import argparse
import json
import time
from pathlib import Path

from layouts import RESULTS, SET_LAYOUT
from sets import SETS, make_set
from training import accuracy, make_base, measures, student_of, untrained
from world import World

from rlp.measure.results_file import add_result, read_results

PROXY, BLANK = 1000, 2000
"""Added to the seed: the proxy is another model than the one that the students begin from, and the
untrained one a third."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked_for = parser.parse_args()
    for seed in range(asked_for.first, asked_for.first + asked_for.seeds):
        there = read_results(asked_for.results, SET_LAYOUT)
        todo = [name for name in SETS if not there.has(arm=name, seed=seed)]
        if not todo:
            continue
        world = World(seed)
        base, proxy = make_base(world, seed), make_base(world, seed + PROXY)
        blank, held_out = untrained(seed + BLANK), world.held_out(seed)
        for name in todo:
            start = time.process_time()
            problems = make_set(world, name, seed)
            found = measures(problems, proxy, blank)
            found["accuracy"] = accuracy(student_of(base, problems, seed), held_out)
            found["accuracy_before"] = accuracy(base, held_out)
            line = {"arm": name, "seed": seed, **found, "seconds": time.process_time() - start}
            add_result(asked_for.results, SET_LAYOUT, line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

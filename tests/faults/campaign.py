"""Many random faults: each run is killed, perhaps several times, continued, and compared with one that was not.

    python -m tests.faults.campaign --kills 200 --seed 0 --json campaign.json
    python -m tests.faults.campaign --seed 0 --case 17      # one of them again

A case is drawn from (seed, its number) alone: ranks, ZeRO stage, dtype, and two to six kills, each at a random passage of
a random point, or at a random time. The table of (ranks, stage, dtype) is gone through in order, so that 12 cases meet all of it.
"""

import argparse
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Harness, Outcome  # noqa: E402

from rlp.faults import FAULT_POINTS  # noqa: E402

TOPOLOGIES = list(itertools.product((1, 2), (1, 2, 3), ("float32", "bfloat16")))
"""Ranks, ZeRO stage, dtype."""

PASSAGES = {"rollout": 4, "score": 30, "backward": 12, "optimizer": 4, "teacher.refresh": 4, "step.before_log": 4, "append.before_line": 20, "append.torn_line": 20,
            "append.after_line": 20, "resume.before_truncate": 6, "save.before_part": 2, "save.torn_part": 2, "save.after_shard": 2, "save.before_rename": 2, "save.after_rename": 2}
"""About how often a continued run passes a point; once where it is not said. A fault that is never come to is no kill."""

EVERY_RANK = ("rollout", "score", "backward", "optimizer", "teacher.refresh", "step.before_log", "evaluation", "resume.before_restore", "save.before_part", "save.torn_part", "save.after_shard", "export.before_write")
"""The other points are passed by the first rank alone."""


def draw(seed: int, number: int) -> Case:
    """The case of a number."""
    noise = random.Random(f"{seed}/{number}")
    ranks, stage, dtype = TOPOLOGIES[number % len(TOPOLOGIES)]
    faults = []
    for attempt in range(noise.randint(2, 6)):
        if noise.random() < 0.25:
            faults.append(f"kill:{noise.randrange(ranks)}:{noise.uniform(0.1, 3.0 * ranks):.2f}")
            continue
        point = noise.choice(sorted(name for name in FAULT_POINTS if attempt or not name.startswith("resume.")))
        faults.append(f"{point}:{noise.randint(1, PASSAGES.get(point, 1))}:kill" + (f"@rank{noise.randrange(ranks)}" if point in EVERY_RANK else "@rank0"))
    other = noise.random() < 0.2 and dtype == "float32"
    return Case(tuple(faults), ranks=ranks, resume_ranks=3 - ranks if other else None, settings={"engine.zero_stage": stage, "engine.dtype": dtype})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="stop after so many attempts in which a rank was killed")
    parser.add_argument("--minutes", type=float, default=60, help="or after so much time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="play this case only, and keep its folder")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults."))
    harness = Harness(folder)
    started, cases, failing, outcomes, kills = time.monotonic(), 0, [], [], 0
    numbers = itertools.count() if options.case is None else [options.case]
    for number in numbers:
        if kills >= options.kills or time.monotonic() - started > 60 * options.minutes:
            break
        case = draw(options.seed, number)
        outcome = harness.play(case, f"case_{number}", allow_missed=True)
        cases, outcomes = cases + 1, [*outcomes, outcome]
        kills += sum(-9 in codes for codes in outcome.codes)
        print(f"{number}: {'survived' if not outcome.problems else 'FAILED'}  {case}  ({kills} kills, {time.monotonic() - started:.0f} s)", flush=True)
        if outcome.problems:
            failing.append({"case": number, "what": str(case), "problems": outcome.problems, "again": f"python -m tests.faults.campaign --seed {options.seed} --case {number}"})
            print("\n".join(outcome.problems), flush=True)
        elif options.case is None:
            for left in folder.glob(f"case_{number}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    harness.close()
    summary = summarize(outcomes) | {"survived": cases - len(failing), "total": cases, "kills": kills, "seed": options.seed, "minutes": round((time.monotonic() - started) / 60, 1), "failing": failing}
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    if failing or options.case is not None:
        print(f"the run folders are in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if failing else 0


def summarize(outcomes: list[Outcome]) -> dict:
    """Largest loss, and how long recovery and survivors took."""
    def column(name: str) -> list[float]:
        return [value for outcome in outcomes for value in getattr(outcome, name)]

    return {"lost_steps_max": max(column("lost_steps"), default=0), "recovery_s_median": round(statistics.median(column("recovery_s") or [0]), 2),
            "survivor_s_max": round(max(column("survivor_s"), default=0), 2), "hung": sum(outcome.hung for outcome in outcomes)}


if __name__ == "__main__":
    sys.exit(main())

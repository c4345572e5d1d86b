"""Many random faults: each run is struck, perhaps several times, continued, and compared with one
that was not.

    python -m tests.faults.campaign --kills 200 --seed 0 --json campaign.json
    python -m tests.faults.campaign --seed 0 --case 17      # one of them again

A case is drawn from (seed, its number) alone: ranks, ZeRO stage, dtype, and two to six attempts,
each with a fault of one of `KINDS`. The table of (ranks, stage, dtype) is gone through in order, so
that 12 cases meet all of it.
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
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlp.process.faults import FAULT_POINTS
from tests.faults.harness import Attempt, Case, Harness, Outcome

TOPOLOGIES = list(itertools.product((1, 2), (1, 2, 3), ("float32", "bfloat16")))
"""Ranks, ZeRO stage, dtype."""

PASSAGES = {
    "rollout": 4,
    "score": 30,
    "backward": 12,
    "optimizer": 4,
    "teacher.refresh": 4,
    "step.before_log": 4,
    "append.before_line": 20,
    "append.torn_line": 20,
    "append.after_line": 20,
    "resume.before_truncate": 3,
    "save.before_part": 2,
    "save.torn_part": 2,
    "save.after_shard": 2,
    "save.before_rename": 2,
    "save.after_rename": 2,
}
"""About how often a continued run passes a point; once where it is not said. A fault that is never
come to is none."""

EVERY_RANK = (
    "rollout",
    "score",
    "backward",
    "optimizer",
    "teacher.refresh",
    "step.before_log",
    "evaluation",
    "resume.before_restore",
    "save.before_part",
    "save.torn_part",
    "save.after_shard",
    "export.before_write",
)
"""The other points are passed by the first rank alone."""

COMPUTING = ("rollout", "score", "backward", "evaluation")
"""Points at which nothing is being written."""

WRITING = tuple(
    name
    for name in FAULT_POINTS
    if (".torn_" in name or ".before_" in name)
    and name not in ("step.before_log", "resume.before_restore", "export.before_write")
) + ("summary",)
"""Points at which a file is written, named or cut, so that a disk can be full."""

WATCHDOG_S = 8.0
"""Of an attempt in which a rank is stopped for longer."""


def _met(points: Iterable[str], first: bool) -> list[str]:
    """Those that a first attempt can come to, or a later one: there is a folder then."""
    return [name for name in points if not name.startswith("resume." if first else "folder.")]


def _rank_that_passes(noise: random.Random, point: str, ranks: int) -> int:
    """Any that comes to the point: of most points that is the first alone."""
    return noise.randrange(ranks) if point in EVERY_RANK else 0


def kill_at_a_point(noise: random.Random, ranks: int, first: bool) -> Attempt:
    """SIGKILL, of any rank that passes the point."""
    point = noise.choice(sorted(_met(FAULT_POINTS, first)))
    passage = noise.randint(1, PASSAGES.get(point, 1))
    return Attempt(f"{point}:{passage}:kill@rank{_rank_that_passes(noise, point, ranks)}")


def kill_at_a_time(noise: random.Random, ranks: int, first: bool) -> Attempt:
    """SIGKILL, wherever the rank is."""
    return Attempt(kill=(noise.randrange(ranks), round(noise.uniform(0.1, 3.0 * ranks), 2)))


def full_disk(noise: random.Random, ranks: int, first: bool) -> Attempt:
    """At one write, or at this one and all that pass the same point after it: the run goes on, or
    says what it could not write."""
    point = noise.choice(_met(WRITING, first))
    passage, until = noise.randint(1, PASSAGES.get(point, 1)), noise.choice(["", "", "-"])
    rank = _rank_that_passes(noise, point, ranks)
    return Attempt(f"{point}:{passage}{until}:enospc@rank{rank}", ends_with=(0, 2, 73, 74))


def asked_to_stop(noise: random.Random, ranks: int, first: bool, action: str) -> Attempt:
    """SIGTERM or SIGHUP, to one rank: all save."""
    point = noise.choice(COMPUTING)
    return Attempt(
        f"{point}:{noise.randint(1, PASSAGES.get(point, 1))}:{action}@rank{noise.randrange(ranks)}",
        ends_with=(75,),
    )


def stopped_shortly(noise: random.Random, ranks: int, first: bool) -> Attempt:
    """SIGSTOP, and SIGCONT before the watchdog barks: nothing happens."""
    point = noise.choice(COMPUTING)
    return Attempt(
        f"{point}:{noise.randint(1, PASSAGES.get(point, 1))}:stop@rank{noise.randrange(ranks)}",
        wake_s=noise.uniform(0.1, 1.0),
        ends_with=(0,),
    )


def stopped_long(noise: random.Random, ranks: int, first: bool) -> Attempt:
    """SIGSTOP for longer than the watchdog waits: peers end, and the rank when it wakes; a single
    process goes on."""
    point = noise.choice(("score", "backward"))
    return Attempt(
        f"{point}:{noise.randint(1, PASSAGES[point])}:stop@rank{noise.randrange(ranks)}",
        settings={"run.watchdog_s": WATCHDOG_S},
        wake_s=2 * WATCHDOG_S if ranks == 1 else None,
        ends_with=(0,) if ranks == 1 else (69, 70),
    )


def launcher_killed(noise: random.Random, ranks: int, first: bool) -> Attempt:
    """Within the first seconds, or before the rank's first line of its own: before there is
    anything to save, or with a save."""
    return Attempt(
        launcher_s=round(noise.choice([0.0, noise.uniform(0.0, 1.5 * ranks)]), 2),
        ends_with=(69, 75),
    )


def clock_set_back(noise: random.Random, ranks: int, first: bool) -> Attempt:
    """By a day, in a run with a deadline that it would reach some seconds later, made slow enough
    to meet it."""
    return Attempt(
        "rollout:1:past,rollout:2-:slow", settings={"checkpoint.save_by": 4}, ends_with=(0, 75)
    )


def two_jobs(noise: random.Random, ranks: int, first: bool) -> Attempt:
    """The same job twice in one folder: one is refused, or finds the run complete."""
    return Attempt(twin_s=round(noise.uniform(0.0, 1.5 * ranks), 2), ends_with=(0, 2))


KINDS = {
    "kill at a point": (45, kill_at_a_point),
    "kill at a time": (15, kill_at_a_time),
    "full disk": (14, full_disk),
    "SIGTERM": (4, partial(asked_to_stop, action="term")),
    "SIGHUP": (4, partial(asked_to_stop, action="hup")),
    "launcher killed early": (6, launcher_killed),
    "stopped shortly": (3, stopped_shortly),
    "stopped long": (3, stopped_long),
    "clock set back": (3, clock_set_back),
    "two jobs": (3, two_jobs),
}
"""Weight in the draw, and what draws an attempt."""


def draw(seed: int, number: int) -> Case:
    """The case of a number."""
    noise = random.Random(f"{seed}/{number}")
    ranks, stage, dtype = TOPOLOGIES[number % len(TOPOLOGIES)]
    other = noise.random() < 0.2 and dtype == "float32"
    attempts = []
    for index in range(noise.randint(2, 6)):
        kind = noise.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        attempts.append(
            replace(
                KINDS[kind][1](noise, 3 - ranks if other and index else ranks, not index), kind=kind
            )
        )
    return Case(
        tuple(attempts),
        ranks=ranks,
        resume_ranks=3 - ranks if other else None,
        settings={"engine.zero_stage": stage, "engine.dtype": dtype},
    )


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills",
        type=int,
        default=200,
        help="stop after so many attempts in which a rank was killed (SIGKILL)",
    )
    parser.add_argument("--minutes", type=float, default=60, help="or after so much time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="play this case only, and keep its folder")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def main() -> int:
    options = read_arguments()
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
        print(
            f"{number}: {'survived' if not outcome.problems else 'FAILED'}  {case}  ({kills} kills,"
            f" {time.monotonic() - started:.0f} s)",
            flush=True,
        )
        if outcome.problems:
            failing.append(
                {
                    "case": number,
                    "what": str(case),
                    "problems": outcome.problems,
                    "again": (
                        f"python -m tests.faults.campaign --seed {options.seed} --case {number}"
                    ),
                }
            )
            print("\n".join(outcome.problems), flush=True)
        elif options.case is None:
            for left in folder.glob(f"case_{number}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    harness.close()
    summary = summarize(outcomes) | {
        "survived": cases - len(failing),
        "total": cases,
        "kills": kills,
        "seed": options.seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "failing": failing,
    }
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    if failing or options.case is not None:
        print(f"the run folders are in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if failing else 0


def summarize(outcomes: list[Outcome]) -> dict:
    """What struck how often, largest loss, and how long recovery and survivors took."""

    def column(name: str) -> list[float]:
        return [value for outcome in outcomes for value in getattr(outcome, name)]

    struck = Counter(kind for outcome in outcomes for kind in outcome.struck)
    return {
        "struck": {kind: struck[kind] for kind in KINDS},
        "lost_steps_max": max(column("lost_steps"), default=0),
        "recovery_s_median": round(statistics.median(column("recovery_s") or [0]), 2),
        "survivor_s_max": round(max(column("survivor_s"), default=0), 2),
        "hung": sum(outcome.hung for outcome in outcomes),
    }


if __name__ == "__main__":
    sys.exit(main())

"""A long run under load that is killed again and again, watched from outside: does anything grow,
is anything lost?

    python -m tests.faults.soak --minutes 20 --every 60 --json soak.json

The quickstart on two ranks under ZeRO-2, as real processes, with a checkpoint every 20 steps and an
evaluation every 100. Every `--every` seconds a rank, chosen at random, gets SIGKILL; the other must
end by itself, and the run is continued with run.resume=auto. In the end it is asked to stop by
SIGTERM, and held against a run of the same length that nobody disturbed, as long as `--compare`
steps.

Resident memory and open file handles of each rank are read every second. Growth within a life is
told as the slope of a straight line from 15 seconds after its first step on.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from rlp.measure.journal import audit
from tests import REPOSITORY
from tests.faults.harness import continued_from, last_step
from tests.training import rank_environment, read_lines

SETTINGS = [
    "engine.zero_stage=2",
    "budget.steps=1000000",
    "checkpoint.every_n_steps=20",
    "evaluation.every_n_steps=100",
    "logging.every_n_steps=50",
    "logging.thoughts=4",
]
PREEMPTED, PEER_LOST = 75, 69


class Ranks:
    """Two ranks of the run, from their start to their end."""

    def __init__(self, run: Path, life: int, log: Path) -> None:
        command = [
            sys.executable,
            "train.py",
            "configs/quickstart.yaml",
            f"run.dir={run}",
            "run.resume=auto",
            *SETTINGS,
        ]
        self._log = log.open("a", encoding="utf-8")
        self.processes = [
            psutil.Popen(
                command,
                env=rank_environment(rank, 2, 29600 + life % 100),
                cwd=REPOSITORY,
                stdout=self._log,
                stderr=self._log,
            )
            for rank in range(2)
        ]
        self.samples: list[tuple[float, int, int, int]] = []
        """Time, rank, resident bytes, open file handles."""

    def sample(self) -> None:
        for rank, process in enumerate(self.processes):
            try:
                self.samples.append(
                    (time.monotonic(), rank, process.memory_info().rss, process.num_fds())
                )
            except psutil.Error:
                pass  # it has ended; `wait` says how

    def wait(self, limit_s: float) -> list[int | None]:
        """Exit codes; None for one that did not end in time, and is killed."""
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(limit_s))
            except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
                process.kill()
                codes.append(None)
        self._log.close()
        return codes


def begun_at(log: Path, known: int) -> int:
    """The step that a life began with, by what it said; `known` until it has said so."""
    said = continued_from(log.read_text(encoding="utf-8", errors="replace"))
    return known if said is None else said


def slope_per_minute(
    samples: list[tuple[float, int, int, int]], column: int, since: float
) -> float:
    """Growth of a rank's memory or handles in a life, the larger of the two ranks."""
    slopes = [0.0]
    for rank in range(2):
        points = np.array(
            [
                (when, sample[column])
                for sample in samples
                if sample[1] == rank and (when := sample[0]) >= since
            ],
            dtype=float,
        )
        if len(points) >= 10:
            slopes.append(float(np.polyfit((points[:, 0] - points[0, 0]) / 60, points[:, 1], 1)[0]))
    return max(slopes)


def soak(run: Path, minutes: float, every_s: float, seed: int) -> dict:
    """Kill and continue for some minutes; what was seen."""
    noise = random.Random(seed)
    end, lives = time.monotonic() + 60 * minutes, []
    while time.monotonic() < end:
        known, started, log = (
            last_step(run),
            time.monotonic(),
            run.with_name(f"life_{len(lives) + 1}.log"),
        )
        ranks = Ranks(run, len(lives), log)
        stop, first = min(started + every_s, end), None
        while time.monotonic() < stop and all(
            process.poll() is None for process in ranks.processes
        ):
            time.sleep(1)
            ranks.sample()
            if first is None and last_step(run) > begun_at(log, known):
                first = time.monotonic()
        reached = last_step(run)
        final = time.monotonic() >= end
        if final:
            for process in ranks.processes:
                process.send_signal(signal.SIGTERM)
        else:
            noise.choice(ranks.processes).kill()
        codes, begun = ranks.wait(60), begun_at(log, known)
        lives.append(
            {
                "codes": codes,
                "first_step": begun,
                "reached": reached,
                "lost_steps": known - begun,
                "recovery_s": first - started if first else None,
                "rss_max_bytes": max((sample[2] for sample in ranks.samples), default=0),
                "fds_max": max((sample[3] for sample in ranks.samples), default=0),
                "rss_bytes_per_minute": slope_per_minute(ranks.samples, 2, (first or end) + 15),
                "fds_per_minute": slope_per_minute(ranks.samples, 3, (first or end) + 15),
            }
        )
        print(
            f"life {len(lives)}: steps {lives[-1]['first_step']} to {reached}, exit codes {codes},"
            f" {lives[-1]['rss_max_bytes'] / 2**20:.0f} MiB, {lives[-1]['fds_max']} handles",
            flush=True,
        )
    return {"lives": lives}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS", help="between kills")
    parser.add_argument(
        "--compare",
        type=int,
        default=200,
        metavar="STEPS",
        help="length of the undisturbed run that the journal is held against",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="must not exist")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def main() -> int:
    options = read_arguments()
    os.chdir(REPOSITORY)
    options.folder.mkdir(parents=True)
    run, calm = (options.folder / "run").resolve(), (options.folder / "calm").resolve()
    told = soak(run, options.minutes, options.every, options.seed)
    lives = told["lives"]
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    subprocess.run(
        [
            sys.executable,
            "train.py",
            "configs/quickstart.yaml",
            f"run.dir={calm}",
            *SETTINGS,
            f"budget.steps={min(options.compare, steps[-1])}",
        ],
        env=rank_environment(0, 1, 29590),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    differences = [text for text in audit(run, calm, tolerance=1e-4) if "one too many" not in text]
    killed, ended = lives[:-1], lives[-1]
    told |= {
        "kills": len(killed),
        "lost_steps_max": max(life["lost_steps"] for life in lives),
        "recovery_s_median": statistics.median(
            life["recovery_s"] for life in lives[1:] if life["recovery_s"]
        ),
        "rss_bytes_per_minute_median": statistics.median(
            life["rss_bytes_per_minute"] for life in lives
        ),
        "fds_per_minute_max": max(life["fds_per_minute"] for life in lives),
        "rss_max_bytes": [life["rss_max_bytes"] for life in lives],
        "each_step_once": steps == list(range(1, len(steps) + 1)),
        "steps": len(steps),
        "differences": differences,
        "survivor_ended_by_itself": all(None not in life["codes"] for life in lives),
        "end": ended["codes"],
    }
    print(
        json.dumps(
            {name: value for name, value in told.items() if name not in ("lives", "rss_max_bytes")}
        )
    )
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))
    return (
        0
        if told["each_step_once"]
        and not differences
        and told["survivor_ended_by_itself"]
        and ended["codes"] == [PREEMPTED] * 2
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())

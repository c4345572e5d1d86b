"""The loop that makes data, with each way to keep: at equal proposals and equal numbers kept; adds
a line to loop.jsonl for each arm and seed, and goes on where it was stopped.

    python experiments/prismatic/loop.py --seeds 8

The generator is a stand-in for a language model: it writes in the manner of a shot, or falls back
on habits of its own, which are few. The solver is right in a share of its answers that depends on
the skill.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from layouts import LOOP, LOOP_ARMS, LOOP_LAYOUT
from training import (
    accuracy,
    entry_entropy,
    gradients,
    hidden_features,
    make_base,
    skill_entropy,
    student_of,
)
from world import ALL_FILLERS, ID, SKILLS, SYMBOLS, Problem, World

from rlp.measure.results_file import add_result, read_results
from rlp.post.selection import g_vendi, unit_rows
from rlp.post.selection_loop import Example, LoopRule, Round, grow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROXY = 1000
"""Added to the seed, as in run.py."""

START, ROUNDS, PROPOSALS, TAKE = 32, 6, 96, 32
"""Examples to begin with; in a round so many are proposed, and a third of them is kept."""
COPIES, IMITATES = 0.15, 0.5
"""Chances that a proposal is a shot again; that it is of a shot's skill."""
HABIT = np.arange(1, SKILLS + 1, dtype=np.float64) ** -1.5
"""Otherwise: how likely the generator is to think of each skill."""
LEAST_RIGHT, MOST_RIGHT = 0.45, 0.95
"""Of the solver's answers, by skill."""
CLUSTERS = 24


class Stand:
    """Generator and solver of a seed, with what they said."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, random.Random(f"prismatic stand {seed}")
        self.order = self.rng.sample(range(SKILLS), SKILLS)
        self.right = [self.rng.uniform(LEAST_RIGHT, MOST_RIGHT) for _ in range(SKILLS)]
        self.first: dict[str, bool] = {}
        """Whether the first answer to a prompt was right."""

    def habitual(self) -> Problem:
        skill = self.rng.choices(self.order, HABIT)[0]
        return self.of_skill(skill)

    def of_skill(self, skill: int) -> Problem:
        names = self.world.names[skill]
        return self.world.problem(self.rng, names=names, fillers=ALL_FILLERS)

    def propose(self, shots: list[Example], count: int) -> list[str]:
        found = []
        for _ in range(count):
            draw, shot = self.rng.random(), self.rng.choice(shots)
            if draw < COPIES:
                found.append(shot.prompt)
            elif draw < COPIES + IMITATES:
                found.append(self.of_skill(self.skill(shot.prompt)).prompt)
            else:
                found.append(self.habitual().prompt)
        return found

    def solve(self, prompt: str, count: int) -> list[str]:
        right = self.world.right(prompt.split())
        said = []
        for _ in range(count):
            wrong = self.rng.choice([f"s{i}" for i in range(SYMBOLS) if f"s{i}" != right])
            knows = self.rng.random() < self.right[self.skill(prompt)]
            said.append(right if knows else wrong)
        self.first.setdefault(prompt, said[0] == right)
        return said

    def skill(self, prompt: str) -> int:
        return self.world.skill_of[prompt.split()[1]]

    def problem(self, example: Example) -> Problem:
        words = tuple(example.prompt.split())
        return Problem(self.skill(example.prompt), int(words[2][1:]), words, example.completion)


def word_features(problems: list[Problem]) -> np.ndarray:
    """[N, V] of length 1: which words a document has."""
    rows = np.zeros((len(problems), len(ID)), dtype=np.float32)
    for row, problem in enumerate(problems):
        for word in problem.text.split():
            rows[row, ID[word]] = 1
    return unit_rows(rows)


def features_of(arm: str, stand: Stand, proxy: "PreTrainedModel"):
    """What an arm keeps by; None: at random."""
    if arm in ("random", "all"):
        return None
    made = {
        "words": word_features,
        "hidden": lambda problems: hidden_features(proxy, problems, centred=False),
        "gradient": lambda problems: gradients(proxy, problems),
    }[arm]
    return lambda examples: made([stand.problem(example) for example in examples])


def begin(world: World, seed: int) -> tuple[Stand, list[Example]]:
    """Every arm of a seed begins alike."""
    stand = Stand(world, seed)
    first = [stand.habitual() for _ in range(START)]
    return stand, [Example(one.prompt, one.answer) for one in first]


def line_of(arm: str, seed: int, world: World, base, proxy) -> dict:
    """Grow a pool, train a student on it."""
    stand, pool = begin(world, seed)
    rule = LoopRule(
        proposals=PROPOSALS,
        take=None if arm == "all" else TAKE,
        answers=5,
        clusters=CLUSTERS,
        seed=seed,
    )
    rounds = list(
        grow(pool, stand.propose, stand.solve, features_of(arm, stand, proxy), rule, rounds=ROUNDS)
    )
    problems = [stand.problem(example) for example in pool]
    kept = problems[START:]
    return {
        "arm": arm,
        "seed": seed,
        "kept": len(kept),
        "proposed": sum(one.proposed for one in rounds),
        "answers": sum(one.answers for one in rounds),
        "skills": skill_entropy(problems),
        "entries": entry_entropy(problems),
        "covered": sum(sum(one.skill == s for one in problems) >= 4 for s in range(SKILLS)),
        "error_one": 1 - sum(stand.first.values()) / len(stand.first),
        "error_kept": sum(is_wrong(world, one) for one in kept) / len(kept),
        "undecided": dropped(rounds, "no majority"),
        "duplicates": dropped(rounds, "near-duplicate"),
        "g_vendi": g_vendi(gradients(proxy, problems)),
        "accuracy": accuracy(student_of(base, problems, seed), world.held_out(seed)),
    }


def is_wrong(world: World, problem: Problem) -> bool:
    return world.right(problem.words) != problem.answer


def dropped(rounds: list[Round], reason: str) -> int:
    return sum(one.dropped.get(reason, 0) for one in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--results", type=Path, default=LOOP)
    asked_for = parser.parse_args()
    for seed in range(asked_for.first, asked_for.first + asked_for.seeds):
        there = read_results(asked_for.results, LOOP_LAYOUT)
        todo = [arm for arm in LOOP_ARMS if not there.has(arm=arm, seed=seed)]
        if not todo:
            continue
        world = World(seed)
        base, proxy = make_base(world, seed), make_base(world, seed + PROXY)
        for arm in todo:
            start = time.process_time()
            line = line_of(arm, seed, world, base, proxy)
            line["seconds"] = time.process_time() - start
            add_result(asked_for.results, LOOP_LAYOUT, line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""The sets of documents that are scored and trained on, and the arms by which they are known.

skills_M_fillers_F        M skills, F different filler words; 16 names in all, whatever M
known_skills_M_fillers_32 the same where nine of ten documents are of entries that the base knows
                          already, because the old edition has them too
"""

import random

from world import ALL_FILLERS, NAMES, Problem, World

SKILL_LEVELS, FILLER_LEVELS = (1, 2, 4, 8, 12, 16), (8, 32, 128)
DOCUMENTS = 192
KNOWN_FRAC = 0.9

CONTROLLED = tuple(f"skills_{m}_fillers_{f}" for m in SKILL_LEVELS for f in FILLER_LEVELS)
"""Every answer is right, and every set is half new to the base."""
KNOWN = tuple(f"known_skills_{m}_fillers_32" for m in SKILL_LEVELS)
SETS = (*CONTROLLED, *KNOWN)


def make_set(world: World, name: str, seed: int) -> list[Problem]:
    """`DOCUMENTS` problems."""
    words = name.split("_")
    skills, fillers = int(words[words.index("skills") + 1]), int(words[-1])
    rng = random.Random(f"prismatic set {name} {seed}")
    chosen = rng.sample(range(len(world.names)), skills)
    # 16 names whatever the number of skills: the first ones get one more where it does not divide.
    share = [NAMES // skills + (place < NAMES % skills) for place in range(skills)]
    names = [
        name
        for skill, count in zip(chosen, share)
        for name in rng.sample(world.names[skill], count)
    ]
    those = rng.sample(ALL_FILLERS, fillers)

    problems = []
    while len(problems) < DOCUMENTS:
        knows = rng.random() < KNOWN_FRAC if name.startswith("known") else None
        problem = world.problem(rng, names=names, fillers=those)
        while knows not in (None, is_known(world, problem)):
            problem = world.problem(rng, names=names, fillers=those)
        problems.append(problem)
    return problems


def is_known(world: World, problem: Problem) -> bool:
    """Whether the old edition has the same answer."""
    return world.old[problem.skill][problem.symbol] == world.tables[problem.skill][problem.symbol]

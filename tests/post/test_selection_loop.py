"""The loop that makes data: what each gate lets through, in which order, at which cost."""

import numpy as np
import pytest

from rlp.config import ConfigError
from rlp.post.selection_loop import Example, LoopRule, grow, voted

NUMBERS = {"east": 0, "west": 1, "north": 2, "south": 3}


def prompt(word: str, number: int) -> str:
    return f"{word} {' '.join(f'a{number}b{place}' for place in range(9))}"


def axes(examples: list[Example]) -> np.ndarray:
    """A feature for each first word."""
    return np.eye(4, dtype=np.float32)[[NUMBERS[one.prompt.split()[0]] for one in examples]]


POOL = [Example(prompt("east", i), "1") for i in range(9)] + [Example(prompt("west", 9), "1")]


def proposing(prompts: list[str]):
    waiting = iter(prompts)
    return lambda shots, count: [next(waiting) for _ in range(count)]


def test_a_round_keeps_what_is_new_agreed_upon_and_rare():
    prompts = [
        prompt("east", 100),
        prompt("west", 101),
        prompt("west", 9),  # in the pool
        prompt("west", 101),  # twice
        " ",
        prompt("west", 102),
    ]
    solved = []

    def solve(text: str, count: int) -> list[str]:
        solved.append((text, count))
        return [str(number) for number in range(count)] if "a102" in text else ["yes"] * count

    pool = list(POOL)
    rule = LoopRule(proposals=6, at_once=2, shots=3, answers=5, clusters=2)
    (found,) = grow(pool, proposing(prompts), solve, axes, rule, rounds=1)
    assert found.kept == (Example(prompt("west", 101), "yes"),) == tuple(pool[10:])
    assert found.dropped == {"near-duplicate": 2, "empty": 1, "no majority": 1, "dense": 1}
    assert found.proposed == 6 == len(found.kept) + sum(found.dropped.values())
    # Duplicates were never solved, and who agrees at once is asked for three of five.
    assert [count for _, count in solved] == [3, 3, 3, 2] and found.answers == 11


def test_what_is_kept_is_a_shot_of_the_next_round_and_counts_in_its_cluster():
    shown = []

    def propose(shots, count):
        shown.append([shot.prompt for shot in shots])
        return [prompt("west", 100 + 10 * len(shown) + i) for i in range(count)]

    pool = list(POOL)
    rule = LoopRule(proposals=9, at_once=9, shots=99, answers=1, clusters=2)
    rounds = list(grow(pool, propose, lambda text, count: ["y"] * count, axes, rule, rounds=2))
    assert len(rounds[0].kept) == 9 and len(shown[1]) == 19
    assert rounds[1].dropped == {"dense": 9}  # ten of the west by then, nine of the east


@pytest.mark.parametrize(
    "said, answer, asked",
    [
        (["a", "a", "a", "b", "b"], "a", 3),
        (["a", "b", "a", "b", "b"], "b", 5),
        (["a", "b", "a", "c", "d"], None, 5),
        (["a", "a", "b", "b", "c"], None, 5),
        (["A ", " a", "A"], "a", 2),
        (["a", "b"], None, 2),
        (["a"], "a", 1),
    ],
)
def test_more_than_half_decide_a_vote_with_no_more_answers_than_it_takes(said, answer, asked):
    waiting, key = iter(said), lambda text: text.strip().lower()
    found, count = voted("q", lambda _, n: [next(waiting) for _ in range(n)], len(said), key)
    assert (None if found is None else key(found.completion), count) == (answer, asked)


def test_so_many_are_taken_and_without_features_at_random():
    prompts = [prompt(word, 200 + i) for i, word in enumerate(["east"] * 6 + ["west"] * 2)]
    rule = LoopRule(proposals=8, answers=1, take=3, clusters=2)
    first = {}
    for features in (axes, None):
        pool = list(POOL)
        (found,) = grow(pool, proposing(prompts), lambda _, n: ["y"] * n, features, rule, rounds=1)
        assert len(found.kept) == 3 and found.dropped == {"dense": 5}
        first[features] = [one.prompt.split()[0] for one in found.kept]
    assert first[axes] == ["west", "west", "east"]


def test_a_proposal_without_a_gradient_is_counted():
    def features(examples):
        rows = axes(examples)
        rows[["a300" in one.prompt for one in examples]] = np.nan
        return rows

    rule = LoopRule(proposals=2, answers=1, clusters=2)
    prompts = [prompt("west", 300), prompt("west", 301)]
    (found,) = grow(
        list(POOL), proposing(prompts), lambda _, n: ["y"] * n, features, rule, rounds=1
    )
    assert found.dropped == {"no gradient": 1} and len(found.kept) == 1


@pytest.mark.parametrize(
    "propose, solve, words",
    [
        (lambda shots, n: [], lambda q, n: ["y"] * n, "the generator gave 0 prompts"),
        (lambda shots, n: [4] * n, lambda q, n: ["y"] * n, "the generator gave 4; expected texts"),
        (lambda shots, n: ["a"] * n, lambda q, n: ["y"], "the solver gave 1 completions"),
        (lambda shots, n: ["a"] * n, lambda q, n: [None] * n, "the solver gave None"),
    ],
)
def test_callables_that_give_something_else_are_named(propose, solve, words):
    with pytest.raises(ConfigError, match=words):
        list(grow(list(POOL), propose, solve, axes, LoopRule(proposals=2), rounds=1))
    with pytest.raises(ConfigError, match="pool"):
        list(grow([], propose, solve, axes, LoopRule(proposals=2), rounds=1))

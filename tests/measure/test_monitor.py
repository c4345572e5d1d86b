"""What a step is watched by: each number on thoughts made by hand, and the same number however the
step is cut."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.measure import monitor, thought_statistics
from rlp.measure.metrics import METRICS
from rlp.measure.monitor import STREAK_STEPS, Watch
from rlp.measure.thought_statistics import (
    combine_parts,
    token_scripts,
    watch_ratio,
    watch_rewards,
    watch_thoughts,
)
from rlp.measure.top_thoughts import TopThoughts
from rlp.model.thoughts import Thoughts
from rlp.process.exit_codes import DONE
from rlp.process.ranks import start_ranks
from rlp.process.tally import Tally
from rlp.sampling.mismatch import MISMATCH_METRICS as ONLY
from rlp.sampling.mismatch import mismatch_of
from tests.tiny_models import WORDS
from tests.training import read_lines, tiny_config, train, write_corpus

CLOSE = 3
BUDGET = 6
CYRILLIC, GREEK, KANA, HAN = "\u043a\u043e\u0442", "\u03b1\u03b2", "\u306d\u3053", "\u732b"


@pytest.fixture(scope="module")
def scripts():
    """Of tokens 0 to 9: nothing, Latin, Latin, the close marker (special), Cyrillic, digits, mostly
    Greek, kana, Han, nothing; more have no text."""
    words = ["<pad>", "two", "three", "</think>", CYRILLIC, "42", f"x{GREEK}", KANA, HAN, "--"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>")
    )
    special = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", additional_special_tokens=["</think>"]
    )
    return token_scripts(special, vocabulary=1000, device=torch.device("cpu"))


def thoughts_of(groups):
    """Thoughts [M, G] of token lists; one that does not end with the close marker is truncated."""
    longest = max(len(thought) for group in groups for thought in group)
    tokens = torch.tensor(
        [[thought + [0] * (longest - len(thought)) for thought in group] for group in groups]
    )
    mask = torch.tensor(
        [[[u < len(thought) for u in range(longest)] for thought in group] for group in groups]
    )
    truncated = torch.tensor([[thought[-1] != CLOSE for thought in group] for group in groups])
    return Thoughts(tokens, mask, torch.zeros(mask.shape), mask * 0.5, truncated)


def tally_of(groups, scripts, prefixes=None, targets=None):
    """A tally of thoughts at one position in each document: after its prefix, before its target."""
    prefixes = prefixes or [[1, 2]] * len(groups)
    targets = targets or [[999]] * len(groups)
    documents = [
        Document(id=d, tokens=np.array([*prefix, *target]))
        for d, (prefix, target) in enumerate(zip(prefixes, targets))
    ]
    positions = Positions(
        np.arange(len(groups)), np.array([len(prefix) for prefix in prefixes]), np.array(targets)
    )
    tally = Tally()
    watch_thoughts(
        tally,
        documents,
        positions,
        thoughts_of(groups),
        scripts,
        close_tokens=1,
        max_thought_tokens=BUDGET,
    )
    return tally


def means_of(*tallies):
    """Means over tallies as if each were a rank's."""
    gathered = []
    for tally in tallies:
        tally.reduce(SimpleNamespace(gather=lambda mine: gathered.append(mine) or [mine]))
    means = tallies[0].reduce(SimpleNamespace(gather=lambda mine: gathered))
    combine_parts(means)
    return means


def watched(groups, scripts, **around):
    return means_of(tally_of(groups, scripts, **around))


def test_an_entropy_that_no_sampler_saw_is_left_out_and_not_zero(scripts):
    """Through everything that thoughts are put through on their way to the metrics."""
    seen = thoughts_of([[[10, CLOSE], [CLOSE]], [[11, CLOSE], [10, 12, CLOSE]]])
    unseen = replace(seen, entropy=None)
    unseen = Thoughts.joined([unseen[:1], unseen[1:].padded(2)]).to("cpu").siblings(slice(0, 2))
    assert unseen.entropy is None

    tally, documents = Tally(), [Document(id=d, tokens=np.array([1, 2, 9])) for d in range(2)]
    positions = Positions(np.arange(2), np.full(2, 2), np.full((2, 1), 9))
    watch_thoughts(
        tally, documents, positions, unseen, scripts, close_tokens=1, max_thought_tokens=BUDGET
    )
    means = means_of(tally)
    assert "policy/entropy" not in means and means["thought/tokens_mean"] == 1


def test_lengths_and_ends_of_thoughts(scripts):
    """Of 1, 5, 6 and 0 tokens: one closed, one closed with the last token of its budget, one
    truncated, one closed at once."""
    means = watched(
        [[[10, CLOSE], [10, 11, 12, 13, 14, CLOSE]], [[10, 11, 12, 13, 14, 15], [CLOSE]]], scripts
    )
    assert means["thought/tokens_mean"] == 12 / 4
    assert means["thought/tokens_std"] == pytest.approx(np.std([1, 5, 6, 0]))
    assert (
        means["thought/truncated_frac"],
        means["thought/max_length_frac"],
        means["thought/empty_frac"],
    ) == (1 / 4, 2 / 4, 1 / 4)
    assert means["policy/entropy"] == 0.5


def test_distinct_bigrams_fall_as_thoughts_become_one_template(scripts):
    """Different pairs over all pairs of a group: all differ; all thoughts the same; a loop within
    one thought. A group without a pair does not count."""
    differ, same, loop, nothing = (
        [[20, 21, 22, CLOSE], [22, 21, 20, CLOSE]],
        [[20, 21, 22, CLOSE]] * 2,
        [[20, 20, 20, 20, CLOSE], [CLOSE]],
        [[20, CLOSE], [CLOSE]],
    )
    assert [
        watched([group], scripts)["thought/distinct_bigrams_frac"] for group in (differ, same, loop)
    ] == [1, 1 / 2, 1 / 3]
    assert watched([differ, same, nothing], scripts)[
        "thought/distinct_bigrams_frac"
    ] == pytest.approx((1 + 1 / 2) / 2)
    assert "thought/distinct_bigrams_frac" not in watched([nothing], scripts)


def test_copies_are_runs_of_four_tokens_of_the_own_prefix(scripts):
    """Three of the five runs stand in the own prefix, in any order; those of another position's
    prefix, of the target or with the close marker do not count."""
    thought = [10, 11, 12, 13, 14, CLOSE]  # runs 10 .. 13 and 11 .. 14
    copying = watched(
        [[thought, [12, 13, 14, 15, CLOSE]], [thought, [20, 21, CLOSE]]],
        scripts,
        prefixes=[[12, 13, 14, 15, 10, 11, 12, 13, 14], [1, 2, 1, 2]],
    )["thought/copied_frac"]
    assert copying == 3 / 5
    assert (
        watched(
            [[[10, 11, 12, CLOSE], [10, 11, 12, 13, CLOSE]]],
            scripts,
            prefixes=[[10, 11, 12]],
            targets=[[13]],
        )["thought/copied_frac"]
        == 0
    )
    assert (
        watched(
            [[[10, 11, 12, CLOSE], [10, 11, 12, 13, CLOSE]]],
            scripts,
            prefixes=[[10, 11, 12, CLOSE, 5]],
        )["thought/copied_frac"]
        == 0
    )


def test_a_thought_holds_the_target_where_its_tokens_stand_in_a_row(scripts):
    """Both target tokens, in their order; not one of them, not apart, not those of another
    position, and not the close marker."""
    groups = [
        [[9, 30, 31, CLOSE], [31, 30, CLOSE], [30, 9, 31, CLOSE], [30, CLOSE]],
        [[30, 31, CLOSE], [CLOSE], [32, CLOSE], [32, 33, 9, 9, 9, 9]],
    ]
    assert (
        watched(groups, scripts, targets=[[30, 31], [32, 33]])["thought/holds_target_frac"] == 2 / 8
    )
    assert (
        watched([[[30, CLOSE], [CLOSE]]], scripts, targets=[[30, CLOSE]])[
            "thought/holds_target_frac"
        ]
        == 0
    )
    assert (
        watched([[[30, CLOSE], [CLOSE]]], scripts, targets=[[1, 2, 3, 4, 5]])[
            "thought/holds_target_frac"
        ]
        == 0
    )


def test_tokens_have_the_script_of_most_of_their_letters(scripts):
    """Kana and Han are one script; marks, digits and special tokens have none."""
    named = [
        (scripts.names[script], int(letters))
        for script, letters in zip(scripts.script[:10], scripts.letters[:10])
    ]
    assert named == [
        ("", 0),
        ("latin", 3),
        ("latin", 5),
        ("", 0),
        ("cyrillic", 3),
        ("", 0),
        ("greek", 2),
        ("cjk", 2),
        ("cjk", 1),
        ("", 0),
    ]
    assert not scripts.letters[10:].any() and len(scripts.script) == 1000


def test_a_thought_switches_script_where_most_of_its_letters_are_others_than_the_prefix_has(
    scripts,
):
    """Three letters against eight do not; without letters there is nothing to compare."""
    switching, staying, wordless = [4, 1, 4, CLOSE], [4, 1, 2, CLOSE], [5, 9, CLOSE]
    assert watched([[switching, staying, wordless]], scripts)["thought/script_switch_frac"] == 1 / 2
    assert (
        watched([[[7, CLOSE], [4, CLOSE]]], scripts, prefixes=[[8, 8, 5]])[
            "thought/script_switch_frac"
        ]
        == 1 / 2
    )
    assert "thought/script_switch_frac" not in watched([[wordless, wordless]], scripts)
    assert "thought/script_switch_frac" not in watched(
        [[switching, staying]], scripts, prefixes=[[5, 9]]
    )


def test_rewards_by_position_and_groups_that_teach_nothing():
    """Three positions: gain on average though most thoughts lose; loss; and equal rewards, up to
    rounding."""
    tally = Tally()
    watch_rewards(
        tally,
        torch.tensor([[2.0, -0.5, -0.5], [-1.0, 0.5, -0.5], [0.25, 0.25, 0.25 + 1e-7]]),
        torch.ones(3, 3),
    )
    means = means_of(tally)
    assert means["reward/positive_positions_frac"] == pytest.approx(2 / 3) and means[
        "reward/positive_frac"
    ] == pytest.approx(5 / 9)
    assert means["reward/flat_groups_frac"] == pytest.approx(1 / 3)


def test_of_a_reward_without_its_baseline_only_the_spread_is_told():
    """The level is not known; what does not depend on it is the same as with it."""
    reward, lengths = (
        torch.tensor([[2.0, -0.5, -0.5], [-1.0, 0.5, -0.5]]).double(),
        torch.tensor([[3, 1, 2], [1, 2, 4]]),
    )
    known, unknown = Tally(), Tally()
    watch_rewards(known, reward, lengths)
    watch_rewards(unknown, reward - torch.tensor([[5.0], [7.0]]), lengths, measured=False)
    known, unknown = means_of(known), means_of(unknown)
    assert known.keys() - unknown.keys() == {
        "reward/mean",
        "reward/positive_frac",
        "reward/positive_positions_frac",
    }
    assert unknown == pytest.approx({name: known[name] for name in unknown}, rel=1e-12)


@pytest.mark.parametrize(
    "dtype, log_ratio, alarmed",
    [
        (torch.float32, [1e-5, -1e-5, 0.0], False),
        (torch.float32, [2e-3, 0.0, 0.0], True),
        (torch.float32, [1.5e-3, -1.5e-3, 1.5e-3], True),
        # 0.02 nats rms is rounding in bfloat16, 0.05 at every token is not, nor is one token that
        # is wrong altogether.
        (torch.bfloat16, [0.02, -0.02, 0.02], False),
        (torch.bfloat16, [0.05, -0.05, 0.05], True),
        (torch.bfloat16, [1.1] + [0.0] * 10_000, True),
        (torch.bfloat16, [math.inf, 0.0, 0.0], False),
    ],
)
def test_a_mismatch_of_sampler_and_trainer_is_told_from_rounding(dtype, log_ratio, alarmed):
    """By dtype; before the first update alone, as the ratio may be anything after it. What is not
    finite is the guard's."""
    logprob = torch.tensor([log_ratio])
    behavior, mask = torch.zeros_like(logprob), torch.ones_like(logprob, dtype=torch.bool)
    first, second = Tally(), Tally()
    for tally, is_first in ((first, True), (second, False)):
        watch_ratio(tally, logprob, behavior, mask, 0.2, 0.2, first=is_first)
    assert (mismatch_of(means_of(first), dtype, 1.0) is not None) == alarmed
    assert mismatch_of(means_of(second), dtype, 1.0) is None


def test_the_error_of_a_logit_counts_more_at_a_lower_temperature():
    """The same logits, off by the same amount: at half the temperature twice the log-ratio, and
    four times the KL."""
    at_one, at_half = (
        {"policy/behavior_mismatch_kl": kl, "policy/behavior_mismatch_max": 0.1}
        for kl in (0.9e-3, 3.6e-3)
    )
    assert (
        mismatch_of(at_one, torch.bfloat16, 1.0)
        is mismatch_of(at_half, torch.bfloat16, 0.5)
        is None
    )
    assert [
        mismatch_of(at_half, torch.bfloat16, 1.0)[1],
        mismatch_of({"policy/behavior_mismatch_kl": 0.011}, torch.bfloat16, 1.0)[1],
    ] == [False, True]


def test_a_rank_without_a_measurement_knows_what_the_others_measured():
    """Every rank decides alike on a mean, whoever measured it; and only what is asked for is
    told."""
    idle, busy = Tally(), Tally()
    busy.add("policy/behavior_mismatch_kl", torch.tensor([1.0, 3.0]))
    busy.add_largest("policy/behavior_mismatch_max", torch.tensor([1.0, 3.0]))
    busy.add("lm/loss", torch.ones(1))
    told = []
    for tally in (busy, idle):
        tally.reduce(SimpleNamespace(gather=lambda mine: told.append(mine) or [mine]), ONLY)
    means = [
        tally.reduce(SimpleNamespace(gather=lambda mine: told), ONLY) for tally in (idle, busy)
    ]
    assert means == [dict(zip(ONLY, (2.0, 3.0)))] * 2


def offered(reward: torch.Tensor, starts: list[int], count: int) -> TopThoughts:
    """Thoughts with these rewards [M, G], position by position in micro-batches that begin at
    `starts`."""
    top = TopThoughts(count)
    for start, stop in zip(starts, [*starts[1:], len(reward)]):
        part = reward[start:stop]
        documents = [Document(id=m, tokens=np.array([7, 8, 9])) for m in range(start, stop)]
        positions = Positions(
            np.arange(stop - start), np.full(stop - start, 2), np.full((stop - start, 1), 9)
        )
        top.offer(
            documents,
            positions,
            thoughts_of([[[10 + g, CLOSE] for g in range(part.shape[1])]] * (stop - start)),
            {"reward": part, "advantage": part},
            close_tokens=1,
        )
    return top


def test_the_thoughts_told_are_the_best_and_the_worst_of_all_micro_batches_and_ranks():
    """Of 24 rewards the four largest and the four smallest, largest first, however they come."""
    reward = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = reward.flatten().sort(descending=True).values
    expected = torch.cat([expected[:4], expected[-4:]]).tolist()
    alone = SimpleNamespace(gather=lambda mine: [mine])
    for starts in ([0], [0, 1, 2, 3, 4, 5], [0, 4]):
        told = offered(reward, starts, 8).gather(alone)
        assert [thought["reward"] for thought in told] == expected
        assert all(
            float(reward[thought["document"], thought["thought"][0] - 10]) == thought["reward"]
            for thought in told
        )
    parts = []
    for rank_reward in (reward[:2], reward[2:]):
        offered(rank_reward, [0], 8).gather(
            SimpleNamespace(gather=lambda mine: parts.append(mine) or [mine])
        )
    assert [
        thought["reward"]
        for thought in TopThoughts(8).gather(SimpleNamespace(gather=lambda mine: parts))
    ] == expected
    assert [thought["reward"] for thought in offered(reward[:1], [0], 64).gather(alone)] == reward[
        0
    ].sort(descending=True).values.tolist()


def test_thoughts_that_are_not_finite_are_not_told():
    reward = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    assert [
        thought["reward"]
        for thought in offered(reward, [0, 1], 8).gather(
            SimpleNamespace(gather=lambda mine: [mine])
        )
    ] == [3.0, 2.0]


@pytest.fixture(scope="module")
def random_step():
    """Eight groups of four random thoughts over twelve tokens, two of one group the same, with
    prefixes and targets of the same."""
    generator = np.random.default_rng(0)
    groups = [
        [[*generator.integers(4, 10, generator.integers(0, 8)).tolist(), CLOSE] for _ in range(4)]
        for _ in range(8)
    ]
    groups[1][2] = groups[1][0]
    prefixes = [generator.integers(4, 10, generator.integers(1, 200)).tolist() for _ in range(8)]
    return groups, prefixes, generator.integers(4, 10, (8, 1)).tolist()


def test_ranks_do_not_change_a_number(scripts, random_step):
    """One rank with eight positions, or two with three and five."""
    groups, prefixes, targets = random_step
    whole = watched(groups, scripts, prefixes=prefixes, targets=targets)
    parts = [
        tally_of(groups[here], scripts, prefixes[here], targets[here])
        for here in (slice(0, 3), slice(3, 8))
    ]
    assert means_of(*parts) == pytest.approx(whole, rel=1e-12)
    varied = (
        *("copied", "holds_target", "script_switch", "distinct_bigrams", "empty"),
        *("duplicates", "sibling_overlap"),
    )
    assert all(0 < whole[f"thought/{name}_frac"] < 1 for name in varied)
    assert whole.keys() <= METRICS.keys()


def test_how_many_positions_are_looked_at_together_does_not_change_a_number(
    scripts, random_step, monkeypatch
):
    groups, prefixes, targets = random_step
    whole = watched(groups, scripts, prefixes=prefixes, targets=targets)
    monkeypatch.setattr(thought_statistics, "TOKENS_AT_ONCE", 1)
    assert watched(groups, scripts, prefixes=prefixes, targets=targets) == pytest.approx(
        whole, rel=1e-12
    )


def test_micro_batches_do_not_change_a_number_of_rewards():
    """Rewards are watched micro-batch by micro-batch."""
    reward, lengths = (
        torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double(),
        torch.arange(32).reshape(8, 4) ** 2,
    )
    means = []
    for size in (8, 2, 3):
        tally = Tally()
        for start in range(0, 8, size):
            watch_rewards(tally, reward[start : start + size], lengths[start : start + size])
        means.append(means_of(tally))
    assert means[1] == pytest.approx(means[0], rel=1e-12) and means[2] == pytest.approx(
        means[0], rel=1e-12
    )
    assert means[0].keys() <= METRICS.keys() and not math.isclose(
        means[0]["reward/length_correlation"], 0, abs_tol=1e-3
    )


def test_collapsed_thoughts_are_said_once():
    """At the first step below a fifth of the mean of the first ten, and never again."""
    watch = Watch()
    lengths = [100.0] * 5 + [50.0] * 5 + [15.1, 15.0, 14.9, 90.0, 1.0]
    said = [watch.see({"thought/tokens_mean": length}) for length in lengths]
    assert [index for index, alarms in enumerate(said) if alarms] == [12]
    assert "14.9 tokens on average, 75.0 over the first 10 steps" in said[12][0]


@pytest.mark.parametrize(
    "metric, bad, good, words",
    [
        (
            "thought/truncated_frac",
            0.95,
            0.94,
            "the budget ended 95% of the thoughts of the last 5 steps",
        ),
        ("gain/mean", -1.0, -0.99, "over the last 5 steps a thought cost 1.00 nats"),
    ],
)
def test_thoughts_that_never_close_and_thoughts_that_harm_are_said_once(metric, bad, good, words):
    """At the fifth step in a row, with what to do; a good step begins the count again, one that
    measured nothing does not."""
    watch = Watch()
    steps = [bad] * 4 + [good] + [bad] * 3 + [None] + [bad] * 9
    said = [watch.see({} if value is None else {metric: value}) for value in steps]
    assert [index for index, alarms in enumerate(said) if alarms] == [10] and STREAK_STEPS == 5
    assert words in said[10][0] and "docs/warm_start.md" in said[10][0]


def test_a_reward_without_a_baseline_harms_nobody():
    """It is a log-probability then, which is never above 0."""
    watch = Watch()
    assert not any(watch.see({"gain/mean": -7.0}, has_baseline=False) for _ in range(9))


@pytest.mark.parametrize("cut", [4, 10, 12, 13])
def test_a_resumed_watch_says_what_the_unbroken_one_says(cut):
    """Saved while it still learns the first lengths, after that, and after it has spoken; through
    JSON, as a checkpoint is."""
    lengths = [0.1 * step for step in range(1, 11)] + [0.3, 0.1, 0.01, 0.01]
    steps = [
        {
            "thought/tokens_mean": length,
            "thought/truncated_frac": float(index >= 2),
            "gain/mean": -2.0 * (index >= 6),
        }
        for index, length in enumerate(lengths)
    ]
    unbroken, first, second = Watch(), Watch(), Watch()
    expected = [unbroken.see(step) for step in steps]
    said = [first.see(step) for step in steps[:cut]]
    second.load_state(json.loads(json.dumps(first.state())))
    assert said + [second.see(step) for step in steps[cut:]] == expected
    assert [index for index, alarms in enumerate(expected) if alarms] == [6, 10, 11]


def test_a_resumed_run_keeps_its_alarms_and_its_metrics(
    tmp_path, model_folder, monkeypatch, capsys
):
    """Random thoughts against a threshold that they fall below at step 3. Resumed from step 2, the
    alarm is said again and kept once."""
    monkeypatch.setattr(monitor, "COLLAPSE_STEPS", 2)
    monkeypatch.setattr(monitor, "COLLAPSE_FRACTION", 10)
    monkeypatch.setattr("rlp.run.ending.write_report", lambda *paths: None)
    generator, ranks = np.random.default_rng(0), start_ranks()
    corpus = write_corpus(
        tmp_path / "train.jsonl",
        [" ".join(WORDS[i] for i in generator.integers(5, len(WORDS), size=9)) for _ in range(12)],
    )
    settings = {"checkpoint__every_n_steps": 2, "checkpoint__keep": 9, "budget__steps": 5}
    assert train(tiny_config(tmp_path / "run", model_folder, corpus, **settings), ranks) == DONE
    written = {
        name: (tmp_path / "run" / name).read_bytes() for name in ("metrics.jsonl", "alarms.jsonl")
    }
    assert [line["step"] for line in read_lines(tmp_path / "run" / "alarms.jsonl")] == [3]
    said = [capsys.readouterr().out.count("ALARM step 3: thoughts have collapsed")]
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    (tmp_path / "run" / "summary.json").unlink()
    assert (
        train(
            tiny_config(tmp_path / "run", model_folder, corpus, run__resume="auto", **settings),
            ranks,
        )
        == DONE
    )
    said.append(capsys.readouterr().out.count("ALARM step 3"))
    assert {name: (tmp_path / "run" / name).read_bytes() for name in written} == written
    assert said == [1, 1]

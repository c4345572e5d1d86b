"""The held-out panel: what each prediction is, what does not change it, and what the command says
about it."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlp.config import load_config
from rlp.learn.checkpoint import open_checkpoint
from rlp.measure.decomposition import Decomposition, _selected, bootstrap_intervals
from rlp.measure.frozen import measure_model
from rlp.measure.metrics import EVALUATION
from rlp.measure.panel_scoring import measure_panel, no_think_logprob
from rlp.measure.reward_signal import signal_in_words
from rlp.model.attention import register
from rlp.model.layout import repeated_layout, tree_layout
from rlp.model.policy import Policy
from rlp.model.setup import PanelSetup
from rlp.sampling.native import NativeSampler
from rlp.sampling.rollout import Rollout
from tests.measure.probing import (
    CLOSE,
    OPEN,
    panel,
    probe,
    settings,
    target_logprob,
    thinking_model,
)
from tests.rank_threads import ThreadRank, on_ranks
from tests.tiny_models import ARCHITECTURES, tiny_policy
from tests.training import read_lines


@pytest.mark.parametrize("lay_out", [repeated_layout, tree_layout])
@pytest.mark.parametrize("horizon", [1, 3])
def test_every_prediction_is_that_of_the_row_it_stands_for(lay_out, horizon):
    """With a thought, without, after an empty one and after another document's: hand-built rows,
    scored by transformers."""
    policy, given = tiny_policy(), panel(horizon=horizon)
    if lay_out is tree_layout:
        policy.lm.set_attn_implementation(register("sdpa"))
    found = probe(given, policy=policy, lay_out=lay_out, horizon=horizon)
    plain, donors = tiny_policy(), given.donors()

    def after(m: int, thought: list[int], truncated: bool) -> float:
        prefix = (
            given.documents[given.positions.document[m]]
            .tokens[: given.positions.position[m]]
            .tolist()
        )
        return target_logprob(
            plain,
            [*prefix, OPEN, *thought, *([CLOSE] if truncated else [])],
            given.positions.target[m].tolist(),
        )

    for m in range(len(given)):
        prefix = (
            given.documents[given.positions.document[m]]
            .tokens[: given.positions.position[m]]
            .tolist()
        )
        group = [
            (thought.tolist(), cut)
            for thought, cut in zip(found.thoughts.tokens[m], found.thoughts.truncated[m])
        ]
        foreign = [
            (thought.tolist(), cut)
            for thought, cut in zip(
                found.thoughts.tokens[donors[m]], found.thoughts.truncated[donors[m]]
            )
        ]
        expected = {
            "reasoned": np.mean([after(m, *thought) for thought in group]),
            "shuffled": np.mean([after(m, *thought) for thought in foreign]),
            "empty": after(m, [CLOSE], False),
            "no_think": target_logprob(plain, prefix, given.positions.target[m].tolist()),
        }
        for name, value in expected.items():
            assert found.columns[f"{name}_logprob_nats"][m] == pytest.approx(value, abs=2e-5), (
                name,
                m,
            )


def test_accuracy_is_how_often_the_most_probable_token_is_the_target():
    """Targets that are put in: the most probable word but the open marker, by turns that without a
    thought and that after the first thought."""
    given, plain = panel(), tiny_policy()
    thoughts = probe(given).thoughts  # no target changes them

    def best(row: list[int]) -> int:
        with torch.no_grad():
            logits = plain.lm(torch.tensor([row])).logits[0, -1]
        logits[OPEN] = -torch.inf
        return int(logits.argmax())

    without, after = [], []
    for m, (d, t) in enumerate(given.positions.places()):
        prefix = given.documents[d].tokens[:t].tolist()
        without.append(best(prefix))
        group = zip(thoughts.tokens[m], thoughts.truncated[m])
        rows = ([*prefix, OPEN, *thought, *([CLOSE] if cut else [])] for thought, cut in group)
        after.append([best(row) for row in rows])

    target = np.array([after[m][0] if m % 2 else word for m, word in enumerate(without)])
    positions = replace(given.positions, target=target[:, None])
    found = probe(replace(given, positions=positions)).columns
    assert found["accuracy_without_thought"].tolist() == (np.array(without) == target).tolist()
    expected = (np.array(after) == target[:, None]).mean(axis=1)
    np.testing.assert_allclose(found["accuracy_with_thought"], expected)
    assert 0 < expected.mean() < 1 and not (np.array(without) == target).all()


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_a_thought_is_not_chosen_by_what_it_is_scored_on(horizon):
    """Against a loop over thoughts, with log-probabilities of transformers: one half of the targets
    chooses and the other scores, in turn; and the surest thought is the one whose most probable
    next token has most."""
    config = settings("evaluation.thoughts_per_position=4")
    given, plain = panel(horizon=horizon), tiny_policy()
    found = probe(given, horizon=horizon, config=config)

    def logprobs(m: int, thought: list[int] | None) -> tuple[np.ndarray, float]:
        """[H] of the targets, and that of the most probable first one."""
        d, t = given.positions.document[m], given.positions.position[m]
        context = [*given.documents[d].tokens[:t].tolist(), *(thought or [])]
        target = given.positions.target[m].tolist()
        with torch.no_grad():
            logits = plain.lm(torch.tensor([[*context, *target]])).logits[0, len(context) - 1 : -1]
        logits[:, OPEN] = -torch.inf
        all_of_them = torch.log_softmax(logits, dim=-1)
        own = all_of_them.gather(1, torch.tensor(target)[:, None])[:, 0]
        return own.numpy(), float(all_of_them[0].max())

    half = horizon // 2
    for m in range(len(given)):
        group = zip(found.thoughts.tokens[m], found.thoughts.truncated[m])
        rows = [[OPEN, *thought, *([CLOSE] if cut else [])] for thought, cut in group]
        scored = [logprobs(m, row) for row in rows]
        without = logprobs(m, None)[0].mean()
        surest = max(scored, key=lambda one: one[1])[0].mean()
        empty = logprobs(m, [OPEN, CLOSE])[0].mean()
        chosen = {"surest_thought": surest}
        if horizon > 1:
            first = max(scored, key=lambda one: one[0][half:].sum())[0][:half].sum()
            second = max(scored, key=lambda one: one[0][:half].sum())[0][half:].sum()
            chosen["cross_selected"] = (first + second) / horizon
        for name, its in chosen.items():
            for other, floor in (("gain", without), ("over_empty", empty)):
                column = found.columns[f"{name}_{other}_nats"]
                assert column[m] == pytest.approx(its - floor, abs=2e-5)
    assert ("cross_selected_gain_nats" in found.means) == (horizon > 1)
    assert ("cross_selected_gain_nats" in found.intervals) == (horizon > 1)


def test_chance_is_nothing_to_select():
    """Thoughts whose predictions are noise about that without one: the best of eight gains 1.4
    standard deviations where it is scored on what chose it, and nothing where it is not. Noise of a
    thought that both halves share is selected."""
    random, positions, siblings = np.random.default_rng(0), 20_000, 8
    halves = random.normal(size=(positions, siblings, 2))
    shared = random.normal(size=(positions, siblings, 1))
    zeros = np.zeros((positions, siblings))
    answers = {"surest": zeros, "right_with": zeros}
    answers |= dict.fromkeys(("no_think", "empty"), zeros[:, 0])

    def selected(of_halves: np.ndarray) -> float:
        of_halves = of_halves / 2
        found = _selected(
            answers
            | {
                "reasoned": of_halves.sum(axis=2),
                "reasoned_halves": of_halves,
                "no_think_halves": np.zeros((positions, 2)),
            }
        )
        return found["cross_selected_gain_nats"].mean()

    assert halves.mean(axis=2).max(axis=1).mean() > 0.9
    assert selected(halves) == pytest.approx(0, abs=4 * 0.5**0.5 / positions**0.5)
    assert selected(np.repeat(shared, 2, axis=2)) == pytest.approx(shared.max(axis=1).mean())


def test_the_loss_of_the_documents_is_that_of_transformers():
    """Per token, over all tokens of all documents: plain perplexity."""
    policy, given = tiny_policy(), panel()
    with torch.no_grad():
        losses = [
            (float(policy.lm(input_ids=ids, labels=ids).loss), ids.shape[1] - 1)
            for ids in (torch.from_numpy(document.tokens)[None] for document in given.documents)
        ]
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert probe(given, policy=policy).means["document_loss_nats"] == pytest.approx(
        expected, abs=1e-5
    )


def test_the_panel_samples_in_one_phase_and_runs_thoughts_once(monkeypatch):
    """5 documents, 2 a forward: a phase and a call for all, then 3 passes over the thoughts,
    which say what is most probable too, and 3 over the controls."""
    told, forward = [], Policy.forward

    def counted(policy: Policy, task: str, *arguments: object) -> object:
        told.append(task)
        return forward(policy, task, *arguments)

    class Counted(NativeSampler):
        @contextmanager
        def phase(self):
            told.append("phase")
            with super().phase():
                yield

        def sample(self, *arguments: object, **settings: object) -> Rollout:
            told.append("sample")
            return super().sample(*arguments, **settings)

    monkeypatch.setattr(Policy, "forward", counted)
    policy = tiny_policy()
    model = replace(
        thinking_model(policy, settings()), sampler=Counted(policy, slots=8, shared=False)
    )
    measure_panel(model, panel(), settings(), ThreadRank())
    counts = Counter(told)
    assert counts["phase"] == counts["sample"] == 1
    assert {task: count for task, count in counts.items() if "logprob" in task} == {
        "logprob_greedy_and_surest": 3,
        "logprob": 3,
    }


def test_gains_are_differences_of_columns():
    """Each gain is the reasoned prediction minus the one it is measured against; the start is
    another model's."""
    given = panel()
    other = thinking_model(tiny_policy(seed=1), settings())
    start = no_think_logprob(other, given, settings(), ThreadRank())
    found = probe(given, start=start)
    columns = found.columns
    np.testing.assert_allclose(columns["start_logprob_nats"], start)
    for name in ("start", "no_think", "empty", "shuffled"):
        np.testing.assert_allclose(
            columns[f"gain_over_{name}_nats"],
            columns["reasoned_logprob_nats"] - columns[f"{name}_logprob_nats"],
        )
        assert found.means[f"gain_over_{name}_nats"] == pytest.approx(
            columns[f"gain_over_{name}_nats"].mean()
        )
    assert found.means["positive_gain_frac"] == np.mean(columns["reasoned_logprob_nats"] > start)
    assert abs(found.means["gain_over_start_nats"] - found.means["gain_over_no_think_nats"]) > 0.01
    assert "gain_over_ema_nats" not in found.means


def test_spread_and_length_correlation_are_taken_within_groups():
    """About each group's own mean, pooled over groups."""
    found = probe(panel(), config=settings("evaluation.thoughts_per_position=6"))
    lengths = np.array(
        [
            [len(thought) - (not cut) for thought, cut in zip(*group)]
            for group in zip(found.thoughts.tokens, found.thoughts.truncated)
        ]
    )
    centered, longer = (
        values - values.mean(axis=1, keepdims=True) for values in (found.reasoned_logprob, lengths)
    )
    assert found.means["reward_length_correlation"] == pytest.approx(
        np.corrcoef(centered.ravel(), longer.ravel())[0, 1]
    )
    assert found.means["reward_group_std_nats"] == pytest.approx(
        np.mean([np.std(group, ddof=1) for group in found.reasoned_logprob])
    )
    assert found.means["thought_tokens_mean"] == pytest.approx(lengths.mean())
    assert found.means["thought_empty_frac"] == np.mean(lengths == 0)


def test_shuffled_thoughts_come_from_the_next_document():
    """Never from the same one; where it has fewer positions they are taken again; the last
    document's come from the first."""
    given = panel((9, 3, 12), per_document=3)
    assert given.positions.document.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert given.donors().tolist() == [3, 4, 3, 5, 6, 0, 1, 2]


def test_one_document_has_no_shuffled_thoughts_and_no_intervals():
    """There is no other document to take thoughts from, or to draw."""
    found = probe(panel((9,)))
    assert "gain_over_shuffled_nats" not in found.means and found.intervals == {}
    assert "gain_over_empty_nats" in found.means
    assert signal_in_words(found, settings())[0].startswith(
        "No verdict: the panel holds 1 document,"
    )


def test_one_thought_has_no_siblings():
    """Spread and correlation are left out, not reported as 0."""
    found = probe(panel(), config=settings("evaluation.thoughts_per_position=1"))
    assert not {"reward_group_std_nats", "reward_length_correlation"} & set(found.means)
    many = replace(found, panel=panel((9,) * 30))
    assert signal_in_words(many, settings())[0].startswith(
        "No verdict: one thought at each position"
    )


def told(documents: int = 40, **said: tuple[float, float, float]) -> list[str]:
    """The verdict on a panel that measured (low, mean, high) by name; a random one, of which
    nothing else counts."""
    measured = {
        "gain_over_shuffled_nats": (0.2, 0.3, 0.4),
        "surest_thought_gain_nats": (0.3, 0.4, 0.5),
        "surest_thought_over_empty_nats": (0.3, 0.4, 0.5),
        "cross_selected_over_empty_nats": (0.1, 0.2, 0.3),
        "gain_over_no_think_nats": (0.2, 0.3, 0.4),
        "gain_over_empty_nats": (0.2, 0.3, 0.4),
        "reward_group_std_nats": (0.4, 0.5, 0.6),
    } | said
    found = probe(panel())
    found = replace(
        found,
        panel=panel((9,) * documents),
        means=found.means | {name: value[1] for name, value in measured.items()},
        intervals=found.intervals
        | {name: (value[0], value[2]) for name, value in measured.items()},
    )
    return signal_in_words(found, settings())


def test_below_thirty_documents_there_is_no_verdict():
    """Their intervals are too short to be trusted, however good the means look."""
    few = told(29, reward_length_correlation=(0.4, 0.5, 0.6))
    assert few[0].startswith("No verdict: the panel holds 29 documents, and below 30")
    words = ("SIGNAL", "Thinking", "On topic", "The markers", "Longer")
    assert not [sentence for sentence in few if sentence.startswith(words)]
    assert told(30)[0].startswith("SIGNAL: ")


HARM = {"gain_over_no_think_nats": (-1.6, -1.5, -1.4), "gain_over_empty_nats": (0, 0.1, 0.2)}


@pytest.mark.parametrize(
    "said, verdict, worth, topic",
    [
        ({}, "SIGNAL: there is something to select: the thought after which", "helps", "yes"),
        # With a horizon of 1 a thought taken by lot is enough too: certainty may mislead.
        (
            {"surest_thought_gain_nats": (-0.1, 0.1, 0.3)},
            "SIGNAL: there is something to select: a thought taken by lot is worth +0.300 nats",
            "helps",
            "yes",
        ),
        # About its text, harmful on average, and the chosen ones harm too.
        (
            HARM | {"surest_thought_gain_nats": (-0.4, -0.3, -0.2)},
            "NO SIGNAL: what is selected is the lesser harm",
            "harms",
            "yes",
        ),
        (HARM, "SIGNAL: ", "harms", "yes"),
        (
            HARM | {"surest_thought_gain_nats": (-0.1, 0.1, 0.3)},
            "NO SIGNAL: nothing to select that this panel can see",
            "harms",
            "yes",
        ),
        # Which document a thought is about is told, and decides nothing.
        ({"gain_over_shuffled_nats": (-0.1, 0.1, 0.3)}, "SIGNAL: ", "helps", "not as far"),
        ({"gain_over_shuffled_nats": (-0.3, -0.2, -0.1)}, "SIGNAL: ", "helps", "no"),
        (
            {"reward_group_std_nats": (0.0, 1e-6, 1e-5)},
            "NO SIGNAL: the thoughts of a position all predict alike",
            "helps",
            "yes",
        ),
        # With halves, what certainty chooses decides nothing.
        (
            {"cross_selected_gain_nats": (-0.2, -0.1, 0.1)},
            "NO SIGNAL: nothing to select that this panel can see: a thought chosen by the other",
            "helps",
            "yes",
        ),
        (
            {
                "cross_selected_gain_nats": (0.1, 0.2, 0.3),
                "surest_thought_gain_nats": (-0.4, -0.3, -0.2),
            },
            "SIGNAL: there is something to select: a thought chosen by the other half of the target"
            " tokens is worth +0.200 nats (interval +0.100 to +0.300) against no thought and +0.200"
            " nats (interval +0.100 to +0.300) against an empty one.",
            "helps",
            "yes",
        ),
        # What an empty thought gains as well is no choice among thoughts.
        (
            {
                "gain_over_empty_nats": (-0.1, 0.1, 0.3),
                "surest_thought_over_empty_nats": (-0.2, 0.0, 0.2),
            },
            "NO SIGNAL: the markers gain by themselves, which all thoughts share: a thought taken",
            "helps",
            "yes",
        ),
        (
            {
                "cross_selected_gain_nats": (0.1, 0.2, 0.3),
                "cross_selected_over_empty_nats": (-0.1, 0.0, 0.1),
            },
            "NO SIGNAL: the markers gain by themselves, which all thoughts share: a thought chosen",
            "helps",
            "yes",
        ),
    ],
)
def test_signal_takes_a_chosen_thought_that_gains(said, verdict, worth, topic):
    """What an average thought is worth, and whether it is on topic, are told by themselves."""
    first, *others = told(**said)
    assert first.startswith(verdict)
    (average,) = [one for one in others if one.startswith("Thinking")]
    (about,) = [one for one in others if one.startswith("On topic: ")]
    assert average.startswith(f"Thinking {worth} on average.")
    assert about.startswith(f"On topic: {topic}")
    by_halves = "cross_selected_gain_nats" in said
    assert any(one.startswith("With a horizon of 1") for one in others) == (not by_halves)
    assert any("What usually helps" in one for one in others) == first.startswith("NO SIGNAL")


def test_the_markers_are_blamed_where_an_empty_thought_explains_most():
    """5.76 of 6.84 nats of harm; the same of a gain; not where words do it, or nothing is clear."""

    def of_format(gain: tuple[float, float, float], over_empty: float) -> list[str]:
        sentences = told(
            gain_over_no_think_nats=gain, gain_over_empty_nats=(over_empty, over_empty, over_empty)
        )
        return [sentence for sentence in sentences if sentence.startswith("The markers")]

    (harm,) = of_format((-7.3, -6.84, -6.4), -1.08)
    assert (
        harm.startswith(
            "The markers do the harm: an empty thought, the two markers alone, "
            "costs 5.76 nats, thinking 6.84."
        )
        and "docs/warm_start.md" in harm
    )
    (repaired,) = of_format((-2.1, -1.65, -1.1), 2.24)
    assert (
        "costs 3.89 nats, of which the words of a thought win back 2.24, thinking 1.65." in repaired
    )
    (gain,) = of_format((0.8, 1.0, 1.2), 0.2)
    assert "gains 0.80 nats, thinking 1.00" in gain
    assert of_format((-7.3, -6.84, -6.4), -5.0) == []
    assert of_format((-0.1, 0.1, 0.3), 0.0) == []
    assert of_format((0.8, 1.0, 1.2), 1.3) == []


def assert_same_probe(one: Decomposition, other: Decomposition, tolerance: float) -> None:
    assert [[thought.tolist() for thought in group] for group in one.thoughts.tokens] == [
        [thought.tolist() for thought in group] for group in other.thoughts.tokens
    ]
    assert (
        one.columns.keys() == other.columns.keys()
        and one.intervals.keys() == other.intervals.keys()
    )
    for name, values in one.columns.items():
        np.testing.assert_allclose(values, other.columns[name], atol=tolerance, err_msg=name)
    for name, value in one.numbers().items():
        assert value == pytest.approx(other.numbers()[name], abs=tolerance), name


@pytest.mark.parametrize(
    "change",
    ["evaluation.batch_size=1", "evaluation.batch_size=5", "sampling.slots=3", "run.seed=9"],
)
def test_the_probe_does_not_depend_on_batches_or_the_seed_of_a_run(change):
    """Noise and donors are those of the panel: the same thoughts, and the same rows up to
    rounding."""
    assert_same_probe(probe(panel()), probe(panel(), config=settings(change)), 2e-5)


def test_the_probe_does_not_depend_on_the_number_of_ranks():
    """Five documents in batches of two are three batches: two ranks take two each, one of them for
    company only. A donor may sit on the other rank."""
    policies = [tiny_policy() for _ in range(2)]  # here: threads share torch's generator
    found = on_ranks(2, lambda rank: probe(panel(), policy=policies[rank.rank], ranks=rank))
    for one in found:
        assert_same_probe(probe(panel()), one, 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_probed(name):
    """Attention, state-space and hybrid models: all numbers finite, each of them in the table of
    metrics."""
    numbers = probe(
        panel((6, 8), per_document=1),
        policy=tiny_policy(name),
        config=settings("thought.max_thought_tokens=2", "evaluation.thoughts_per_position=2"),
    ).numbers()
    assert set(numbers) <= set(EVALUATION)
    assert np.isfinite(list(numbers.values())).all()


def ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return total / count


def test_an_interval_covers_the_mean_and_shrinks_with_the_panel():
    """For a plain mean it is the normal interval: 1.96 standard errors on either side."""
    widths = []
    for size in (100, 1600):
        values = np.random.default_rng(0).normal(size=(1, size))
        ((low, high),) = bootstrap_intervals(ratio, values, np.ones((1, size)))
        assert low < values.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * values.std() / size**0.5, rel=0.1)
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.15)


def test_positions_of_one_document_are_drawn_together():
    """Ten equal positions in each document tell no more than one: the interval stays."""
    values = np.random.default_rng(0).normal(size=(1, 50))
    assert bootstrap_intervals(ratio, 10 * values, np.full((1, 50), 10))[0] == pytest.approx(
        bootstrap_intervals(ratio, values, np.ones((1, 50)))[0]
    )


def test_a_drawn_document_brings_its_own_count():
    """Documents of many sizes, each with twice as much as it counts: the ratio is 2 whatever is
    drawn."""
    counts = np.arange(1.0, 51)[None]
    assert bootstrap_intervals(ratio, 2 * counts, counts)[0] == pytest.approx((2, 2))


def test_intervals_are_seeded():
    values = np.random.default_rng(0).normal(size=(3, 20))
    assert bootstrap_intervals(ratio, values, np.ones((3, 20))) == bootstrap_intervals(
        ratio, values, np.ones((3, 20))
    )


def test_every_evaluation_of_a_run_holds_the_whole_decomposition(trained, corpus, ranks, tmp_path):
    """With intervals, before and after; and the same numbers come from its last checkpoint, and
    from its export with the start named."""
    folder = trained(data__held_out=f"[{corpus}]", budget__steps=1)
    lines = read_lines(folder / "evaluation.jsonl")
    names = [
        f"gain_over_{other}_nats" for other in ("start", "ema", "no_think", "empty", "shuffled")
    ] + ["document_loss_nats", "reward_group_std_nats"]
    for line in (lines[0], lines[-1]):
        assert all(line[f"{name}_low"] <= line[name] <= line[f"{name}_high"] for name in names)
    config = load_config(folder / "config.yaml")
    from_step = measure_model(
        PanelSetup(config, print),
        ranks,
        checkpoint=open_checkpoint(folder / "checkpoints" / "step_1"),
    )
    start, config.model.path = config.model.path, str(folder / "export")
    from_export = measure_model(PanelSetup(config, print), ranks, start=start)
    for found in (from_step, from_export):
        assert {"step": 1} | found.numbers() == pytest.approx(
            {name: value for name, value in lines[-1].items() if "_ema_" not in f"_{name}"},
            abs=2e-5,
        )

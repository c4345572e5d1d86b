"""A reward, a position selector, a baseline and a loss of one's own, by `package.module:name`."""

import json
import sys
from pathlib import Path

import pytest
import torch

from rlp import Evidence, Trainer
from rlp import train as program
from rlp.config import ConfigError
from rlp.learn.checkpoint import CheckpointError
from rlp.objective import information_gain
from rlp.process.exit_codes import BAD_CONFIG, DONE
from rlp.process.outside import PartError
from rlp.step.loss import RLP
from tests.training import read_lines, tiny_config, train

OURS_AGAIN = """
import numpy as np
import torch

from rlp.objective import clipped_surrogate, greedy_match, information_gain


class Gain:
    needs = ("baseline_logprob",)

    def __call__(self, evidence):
        return information_gain(evidence.reasoned_logprob, evidence.baseline_logprob)


def match(evidence):
    return greedy_match(evidence.matched)


match.needs = ("matched",)


def uniform(choice):
    return choice.noise.choice(choice.candidates, size=choice.count, replace=False)


class Surprising:
    needs = "surprisal"

    def __call__(self, choice):
        order = np.argsort(-choice.surprisal[choice.candidates], kind="stable")
        return choice.candidates[order][: choice.count]


def ema(no_think):
    return no_think.ema_logprob


ema.needs = ("ema_logprob",)


def frozen(no_think):
    return no_think.start_logprob


frozen.needs = ("start_logprob",)


def surrogate_and_text(scored):
    policy = clipped_surrogate(
        scored.thought_logprob, scored.behavior_logprob, scored.mask, scored.advantage,
        clip_low=0.2, clip_high=0.2,
    )
    terms = {"policy": policy.sum() / scored.num_thoughts}
    if scored.document_logprob.numel():
        text = -scored.document_logprob.sum() / scored.num_tokens
        terms["lm"] = scored.weights.lm_weight * text
    return terms
"""
"""The built-in parts, written once more by a user."""

BROKEN = """
import torch

nothing = 3
calls = []


class Needy:
    def __init__(self, size):
        self.size = size


def raises(evidence):
    return {}["x"]


def flat(evidence):
    return evidence.reasoned_logprob.mean(dim=1)


def words(evidence):
    return "good"


def infinite(evidence):
    return evidence.reasoned_logprob / 0


def late(evidence):
    calls.append(1)
    return evidence.reasoned_logprob * (float("nan") if len(calls) > 2 else 1)


def asks(evidence):
    return evidence.reasoned_logprob


asks.needs = ("baseline_logprobs",)


def beyond(choice):
    return choice.candidates[:1] + 1000


def twice(choice):
    return [choice.candidates[0]] * 2


def no_gradient(scored):
    return {"policy": torch.zeros(())}


def no_terms(scored):
    return torch.zeros(())


def narrow(no_think):
    return torch.zeros(1)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch) -> Path:
    """A folder outside the repository with two modules in it, and the process started there."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "again.py").write_text(OURS_AGAIN)
    (folder / "broken.py").write_text(BROKEN)
    (folder / "torn.py").write_text("def reward(evidence):\n    return (\n")
    (folder / "wants.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("again", "broken", "torn", "wants"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def same_numbers(one: Path, other: Path) -> None:
    """Two runs have logged the same metrics, byte for byte."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"reward__kind": "information_gain"}, {"reward__kind": "again:Gain"}),
        ({"reward__kind": "greedy_match"}, {"reward__kind": "again:match"}),
        ({}, {"position__selector": "again:uniform"}),
        ({"position__selector": "surprisal"}, {"position__selector": "again:Surprising"}),
        ({"baseline__kind": "ema"}, {"baseline__kind": "again:ema"}),
        ({"baseline__kind": "frozen"}, {"baseline__kind": "again:frozen"}),
        ({}, {"objective__kind": "again:surrogate_and_text"}),
    ],
    ids=lambda setting: "-".join(setting.values()),
)
def test_a_part_written_again_by_a_user_is_the_built_in_one(trained, outside, ours, theirs):
    """Every metric of every step, byte for byte: what a part is given is all that ours are."""
    same_numbers(
        trained("ours", budget__steps=2, **ours), trained("theirs", budget__steps=2, **theirs)
    )


def test_a_statistic_that_nobody_needs_is_not_computed(trained, outside):
    """The head once more for the most probable tokens, a forward for surprisal:
    the ledger counts them where a part asks, and nowhere else."""

    def flops(name: str, **settings: str) -> dict[str, float]:
        phases = json.loads(
            (trained(name, budget__steps=1, **settings) / "ledger.json").read_text()
        )
        return {phase: count["flops"] for phase, count in phases["phases"].items()}

    plain, matching = flops("plain"), flops("matching", reward__kind="again:match")
    searching = flops("searching", position__selector="again:Surprising")
    assert matching["train"] > plain["train"] and matching["score"] == plain["score"] == 0
    assert searching["score"] > 0 and searching["train"] > 0


def test_a_reward_handed_to_the_trainer_is_remembered_by_name(
    tmp_path, model_folder, corpus, ranks
):
    """In the run folder and in its checkpoints; a resume without it is refused, and with it goes on
    to the digit."""
    settings = {"budget__steps": 4, "checkpoint__every_n_steps": 2, "checkpoint__keep": 3}
    config = tiny_config(tmp_path / "run", model_folder, corpus, **settings)
    ending = Trainer(config, reward=doubled, ranks=ranks).fit()
    assert (ending.code, ending.summary["steps"]) == (DONE, 4)
    name = f"{__name__}:doubled"
    assert f"kind: {name}" in ending.folder.config_yaml.read_text()

    step_2 = ending.folder.checkpoints / "step_2"
    settings |= {"run__resume": step_2}
    forgotten = tiny_config(tmp_path / "forgotten", model_folder, corpus, **settings)
    with pytest.raises((ConfigError, CheckpointError), match="reward.kind"):
        Trainer(forgotten, ranks=ranks).fit()
    again = tiny_config(tmp_path / "again", model_folder, corpus, **settings)
    resumed = Trainer(again, reward=doubled, ranks=ranks).fit()
    lines = read_lines(ending.folder.metrics_jsonl)
    assert read_lines(resumed.folder.metrics_jsonl) == lines[2:]
    assert resumed.folder.metrics_jsonl.read_bytes() != b""


def doubled(evidence: Evidence) -> torch.Tensor:
    """Twice the information gain."""
    return 2 * information_gain(evidence.reasoned_logprob, evidence.baseline_logprob)


doubled.needs = ("baseline_logprob",)


def test_a_reward_may_be_written_on_the_spot(tmp_path, model_folder, corpus, ranks):
    """In a script or a notebook: it has no name to be imported by, and no resume without it."""
    config = tiny_config(tmp_path / "run", model_folder, corpus, budget__steps=1)
    trainer = Trainer(config, reward=lambda evidence: evidence.reasoned_logprob, ranks=ranks)
    assert trainer.config.reward.kind.endswith("<lambda>") and trainer.fit().code == DONE


def test_what_is_rewarded_is_logged_beside_the_gain(tmp_path, model_folder, corpus, ranks):
    """`reward/*` is what eq. 7 is fed, `gain/*` the information gain, and their ratio is known."""
    config = tiny_config(tmp_path / "run", model_folder, corpus, budget__steps=2)
    ending = Trainer(config, reward=doubled, ranks=ranks).fit()
    for line in read_lines(ending.folder.metrics_jsonl):
        assert line["reward/mean"] == pytest.approx(2 * line["gain/mean"], rel=1e-6)


@pytest.mark.parametrize("placebo", ["shuffled_reward", "foreign_thought"])
def test_a_placebo_goes_around_any_reward(trained, outside, placebo):
    settings = {"reward__placebo": placebo, "budget__steps": 1}
    same_numbers(
        trained("ours", **settings), trained("theirs", reward__kind="again:Gain", **settings)
    )


MISTAKES = {
    "no such module": ("reward__kind", "nowhere:Reward", "there is no module 'nowhere'"),
    "no such name": ("reward__kind", "again:Gane", "has no 'Gane'. Did you mean 'Gain'?"),
    "a torn file": ("reward__kind", "torn:reward", "importing torn raised SyntaxError"),
    "a module it wants": ("reward__kind", "wants:x", "No module named 'nowhere_to_be_found'"),
    "no part": ("reward__kind", "broken:nothing", "is int; expected a function of one argument"),
    "a class with arguments": ("reward__kind", "broken:Needy", "making one without arguments"),
    "it raises": ("reward__kind", "broken:raises", r"raised KeyError: 'x' \(broken.py, line"),
    "another shape": ("reward__kind", "broken:flat", r"shape \[2\]; expected .*\[2, 4\]"),
    "no tensor": ("reward__kind", "broken:words", "gave str; expected a finite tensor"),
    "not finite": ("reward__kind", "broken:infinite", "values -inf; expected a finite"),
    "an unknown need": ("reward__kind", "broken:asks", "Did you mean 'baseline_logprob'?"),
    "no candidate": ("position__selector", "broken:beyond", "which is no candidate; expected"),
    "one of them twice": ("position__selector", "broken:twice", r"gave \[1, 1\]; expected 1 to 1"),
    "no gradient": ("objective__kind", "broken:no_gradient", "terms without a gradient"),
    "no terms": ("objective__kind", "broken:no_terms", "expected a dictionary"),
    "another length": ("baseline__kind", "broken:narrow", r"shape \[1\]; expected .*\[2\]"),
}


@pytest.mark.parametrize("key, name, said", MISTAKES.values(), ids=MISTAKES)
def test_a_broken_part_is_refused_before_the_first_step(
    tmp_path, model_folder, corpus, ranks, outside, key, name, said
):
    """In one message, which names the part and the key; no folder is left."""
    config = tiny_config(tmp_path / "run", model_folder, corpus, **{key: name})
    with pytest.raises(PartError, match=said) as refused:
        Trainer(config, ranks=ranks).fit()
    assert str(refused.value).startswith(key.replace("__", ".")) and name.split(":")[0] in str(
        refused.value
    )
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
    with pytest.raises(PartError, match=said):
        Trainer(config, ranks=ranks).plan()


def test_a_reward_that_breaks_in_the_middle_of_a_run_is_named(
    tmp_path, model_folder, corpus, ranks, outside, monkeypatch, capsys
):
    monkeypatch.setattr("rlp.process.ranks.stop_ranks", lambda: None)
    tiny_config(tmp_path / "run", model_folder, corpus)
    arguments = [
        str(tmp_path / "base.yaml"),
        "reward.kind=broken:late",
        "budget.steps=3",
        "thought.max_thought_tokens=4",
        "optim.batch_size=2",
        "engine.dtype=float32",
    ]
    assert program.main(arguments) == BAD_CONFIG
    said = capsys.readouterr().err
    assert "error: reward.kind: broken:late gave" in said and "values nan; expected" in said
    assert "Traceback" not in said


def test_a_reward_that_needs_the_baseline_has_it_on_every_step(
    tmp_path, model_folder, corpus, ranks, outside
):
    """Refused with a baseline that is not there, or not always."""
    for setting in ({"baseline__kind": "none"}, {"baseline__every_n_steps": 2}):
        config = tiny_config(
            tmp_path / "run", model_folder, corpus, reward__kind="again:Gain", **setting
        )
        with pytest.raises(PartError, match="needs baseline_logprob on every step"):
            Trainer(config, ranks=ranks)


def test_looking_at_a_run_imports_no_part(
    tmp_path, model_folder, corpus, ranks, outside, monkeypatch
):
    """A run folder may come from a stranger: its report and its thoughts are read without what its
    config names."""
    from rlp.cli import main

    config = tiny_config(
        tmp_path / "run", model_folder, corpus, reward__kind="again:Gain", budget__steps=1
    )
    assert train(config, ranks) == DONE
    monkeypatch.delitem(sys.modules, "again")
    (outside / "again.py").write_text("raise SystemExit('imported')")
    assert main(["view", str(tmp_path / "run")]) == 0
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert "again" not in sys.modules


def test_the_built_in_loss_says_what_it_needs(tmp_path):
    """A copy of the starting checkpoint is held for the KL term alone."""
    from rlp.config import ObjectiveConfig

    assert RLP(ObjectiveConfig()).needs == ()
    assert RLP(ObjectiveConfig(kl_weight=0.1)).needs == ("start_logprob",)

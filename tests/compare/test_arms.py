"""The controls: matches, spliced documents, and arms that spend what a run has spent."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rlp.compare.arms import ARMS, KEPT, step_cost, write_arm
from rlp.compare.splice import Splicing, splice
from rlp.config import Config, ConfigError, load_config, to_yaml
from rlp.data.positions import Positions
from rlp.measure.ledger import PHASES, Ledger
from rlp.model.layout import repeated_layout, tree_layout
from rlp.model.markers import Markers
from rlp.model.scoring import score, unpack
from rlp.model.thoughts import ThoughtFormat
from rlp.process.exit_codes import DONE, NOT_MATCHED
from rlp.process.run_folder import open_run_folder
from rlp.sampling.rollout import NoiseKey
from tests.sampled import sample_thoughts
from tests.tiny_models import random_documents, tiny_policy
from tests.training import read_lines, tiny_config, train

FORM = ThoughtFormat(
    markers=Markers(open=(2,), close=(3,)),
    instruction=(),
    begin=None,
    temperature=0.7,
    target_temperature=1.0,
    horizon=2,
)


def two_documents_with_thoughts(policy):
    documents = random_documents([7, 9])
    position = np.array([4, 5])
    positions = Positions(
        np.array([0, 1]),
        position,
        np.stack([document.tokens[t : t + 2] for document, t in zip(documents, position)]),
    )
    return (
        documents,
        positions,
        sample_thoughts(
            policy,
            documents,
            positions,
            FORM,
            NoiseKey(0, 1),
            group_size=3,
            max_thought_tokens=4,
            slots=8,
        ).thoughts,
    )


@pytest.mark.parametrize("lay_out", [repeated_layout, tree_layout])
def test_matches_come_from_the_same_forward_as_log_probabilities(lay_out):
    """`Scores.matched` is what the model's own logits say, and asking for it leaves
    log-probabilities and gradient as they are."""
    policy = tiny_policy("qwen3")
    if lay_out is tree_layout:
        from rlp.model.attention import register

        policy.lm.set_attn_implementation(register("sdpa"))
    documents, positions, thoughts = two_documents_with_thoughts(policy)
    rows = repeated_layout(
        documents, positions, thoughts, FORM, lm=False, no_think=False, device=policy.device
    )
    logits = tiny_policy("qwen3").lm(rows.tokens).logits[rows.row, rows.column]
    logits[:, FORM.markers.excluded] = -torch.inf
    expected = unpack(rows, logits.argmax(dim=1) == rows.target).target.all(dim=1)
    layout = lay_out(
        documents, positions, thoughts, FORM, lm=True, no_think=True, device=policy.device
    )
    plain, asked = score(policy, layout), score(policy, layout, matched=True)
    assert plain.matched is None and torch.equal(asked.matched, expected)
    assert torch.equal(plain.target, asked.target) and torch.equal(plain.thought, asked.thought)
    gradients = [
        torch.autograd.grad(scores.thought.sum() + scores.target.sum(), policy.head)[0]
        for scores in (plain, asked)
    ]
    assert torch.equal(*gradients)


def test_a_match_is_found_where_there_is_one():
    """With the most probable tokens as targets every thought they are probable after is matched."""
    policy = tiny_policy("qwen3")
    documents, positions, thoughts = two_documents_with_thoughts(policy)
    thought_format = ThoughtFormat(
        markers=FORM.markers,
        instruction=(),
        begin=None,
        temperature=0.7,
        target_temperature=1.0,
        horizon=1,
    )
    found = []
    for token in range(5, 48):
        chosen = Positions(positions.document, positions.position, np.full((2, 1), token))
        found.append(
            score(
                policy,
                repeated_layout(
                    documents,
                    chosen,
                    thoughts,
                    thought_format,
                    lm=False,
                    no_think=False,
                    device=policy.device,
                ),
                matched=True,
            ).matched
        )
    # Of all words at most one is the most probable after a thought; with the special tokens exactly
    # one would be.
    assert torch.stack(found).sum(dim=0).le(1).all() and torch.stack(found).any()


def test_exchanged_thoughts_are_those_of_the_position_before():
    """Every field moves, whole groups at a time; the first position gets what it is handed, longer
    or shorter."""
    _, _, thoughts = two_documents_with_thoughts(tiny_policy("qwen3"))
    longer, shorter = thoughts[-1:].padded(2), thoughts[-1:]
    assert thoughts.exchanged(longer).tokens.shape[2] == thoughts.tokens.shape[2] + 2
    assert torch.equal(
        thoughts.padded(2).exchanged(shorter).tokens, thoughts.exchanged(longer).tokens
    )
    exchanged = thoughts.exchanged(thoughts[-1:])
    for name in ("tokens", "mask", "behavior_logprob", "entropy", "truncated"):
        assert torch.equal(getattr(exchanged, name)[1], getattr(thoughts, name)[0]) and torch.equal(
            getattr(exchanged, name)[0], getattr(thoughts, name)[1]
        )


def test_a_budget_ends_at_the_nearest_step(trained):
    """The tokens of two steps and a bit, and of almost three."""
    spent = [
        line["budget/tokens"]
        for line in read_lines(trained("all", budget__steps=4) / "metrics.jsonl")
    ]
    few, many = spent[1] + (spent[2] - spent[1]) // 4, spent[2] - (spent[2] - spent[1]) // 4
    assert (
        len(read_lines(trained("few", budget__steps=None, budget__tokens=few) / "metrics.jsonl"))
        == 2
    )
    assert (
        len(read_lines(trained("many", budget__steps=None, budget__tokens=many) / "metrics.jsonl"))
        == 3
    )


@pytest.mark.parametrize("by, steps", [("tokens", 3), ("flops", 8), ("paper_flops", 20)])
def test_an_arm_spends_what_the_run_has_spent(trained, tmp_path, ranks, capsys, by, steps):
    """Written by `write_arm`, run by train.py, asserted by itself, with both ledgers shown."""
    run = open_run_folder(trained("rlp", budget__steps=steps, logging__every_n_steps=1000))
    config = write_arm(run, "cpt", by, tmp_path / "arm.yaml", None, ["optim.micro_batch_size=4"])
    assert to_yaml(load_config(tmp_path / "arm.yaml")) == to_yaml(config)
    assert train(config, ranks) == DONE
    said = capsys.readouterr().out
    assert "matched run" in said and "this run" in said and said.rstrip().endswith(": matched")
    own, other = (
        json.loads((Path(folder) / "ledger.json").read_text())
        for folder in (config.run.dir, run.path)
    )
    name = {"tokens": "input_tokens"}.get(by, by)
    assert (
        abs(own[name] / other[name] - 1) <= 0.01
        and own["phases"]["train"]["flops"] == 0 < own["phases"]["lm"]["flops"]
    )


def test_an_arm_that_misses_says_so(trained, tmp_path, ranks, capsys):
    """Documents of another number than the config was written for: the run ends, with its own exit
    code and the table."""
    run = open_run_folder(trained("rlp", budget__steps=1))
    config = write_arm(run, "greedy_match", "tokens", tmp_path / "arm.yaml", None, [])
    config.optim.batch_size, config.optim.micro_batch_size = 6, 3
    assert train(config, ranks) == NOT_MATCHED
    assert "NOT MATCHED" in capsys.readouterr().out


def test_an_arm_that_may_miss_is_refused_with_a_batch_that_can_not(
    trained, tmp_path, ranks, capsys
):
    """The advice is taken, and the arm matches. Another budget as well: all that is asked is
    written."""
    run = open_run_folder(trained("rlp", budget__steps=3, logging__every_n_steps=1000))
    with pytest.raises(
        ConfigError,
        match=(
            r"can not be sure to spend what the run has \(flops .* some \d+ steps, and the nearest"
            r" may be .*% off, where 1% is allowed. Write optim.batch_size="
        ),
    ) as refused:
        write_arm(run, "cpt", "flops", tmp_path / "arm.yaml", None, [])
    assert not (tmp_path / "arm.yaml").exists()
    batch = int(re.search(r"Write optim.batch_size=(\d+)", str(refused.value))[1])
    config = write_arm(
        run,
        "cpt",
        "flops",
        tmp_path / "arm.yaml",
        None,
        [f"optim.batch_size={batch}", "optim.micro_batch_size=1"],
    )
    assert train(config, ranks) == DONE and capsys.readouterr().out.rstrip().endswith(": matched")
    with pytest.raises(ConfigError, match="Not even optim.batch_size=1"):
        write_arm(
            open_run_folder(trained("short", budget__steps=1)),
            "greedy_match",
            "flops",
            tmp_path / "other.yaml",
            None,
            [],
        )


def ledger_of(steps: int, *, tokens: float, flops: float, lm: float, seconds: float = 1.0) -> dict:
    """What steps of so much each add up to."""
    return {
        "steps": steps,
        "input_tokens": steps * tokens,
        "flops": steps * flops,
        "paper_flops": 0.0,
        "seconds": steps * seconds,
        "phases": {"lm": {"flops": steps * lm}, "teacher": {"flops": 0.0}},
    }


def test_the_cost_of_a_step_is_bounded_by_what_the_run_has_spent(tmp_path, model_folder, corpus):
    """CPT does the documents' part, at 10 % on top for longer ones; half the batch costs half; the
    same documents cost the same to the token."""
    run = tiny_config(tmp_path / "run", model_folder, corpus)
    cpt = tiny_config(tmp_path / "cpt", model_folder, corpus, objective__policy_weight=0)
    half = tiny_config(tmp_path / "half", model_folder, corpus, optim__batch_size=2)
    ledger = ledger_of(7, tokens=40, flops=1e6, lm=1e5)
    assert step_cost(ledger, run, cpt, "flops")[1] == pytest.approx(1.1e5)
    assert step_cost(ledger, run, half, "flops")[1] == pytest.approx(0.55e6)
    assert step_cost(ledger, run, run, "tokens") == (40, 40)
    assert step_cost(ledger, run, half, "tokens")[1] == pytest.approx(22)
    assert step_cost(ledger, run, half, "tokens", longer=10)[1] == pytest.approx(44)
    assert step_cost(ledger, run, run, "paper_flops")[1] == pytest.approx(44 + 4 * 2 * 4 * 5)
    assert step_cost(ledger, run, cpt, "paper_flops")[1] == pytest.approx(44)
    assert step_cost(ledger, run, cpt, "seconds")[1] == pytest.approx(0.15)
    # 4 documents of 10 tokens; 8 positions' 4 thoughts of 5 tokens, each with its document: 32 x 15
    # tokens against 40, sampled (1) and trained (3) where CPT trains (3).
    assert step_cost(ledger, cpt, run, "flops")[1] == pytest.approx(
        1.1 * 1e6 * (1 + 4 / 3 * 32 * 15 / 40)
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: (folder / "summary.json").unlink(), "not finished"),
        (lambda folder: (folder / "ledger.json").write_text("{}"), "flops is None"),
    ],
)
def test_only_a_finished_run_is_matched(trained, tmp_path, change, words):
    folder = trained("rlp", budget__steps=1)
    change(folder)
    with pytest.raises(ConfigError, match=words):
        write_arm(open_run_folder(folder), "cpt", "flops", tmp_path / "arm.yaml", None, [])
    assert not (tmp_path / "arm.yaml").exists()


def test_another_budget_than_the_ledgers_is_refused(trained, tmp_path, ranks):
    """Who changes the budget of a matched config is told, before the run."""
    run = open_run_folder(trained("rlp", budget__steps=1))
    config = write_arm(run, "cpt", "tokens", tmp_path / "arm.yaml", None, [])
    config.budget.tokens *= 2
    with pytest.raises(ConfigError, match="budget.tokens"):
        train(config, ranks)


def test_every_arm_changes_what_it_says_and_nothing_else(trained, tmp_path):
    """Objective, reward, budget and names; the rest of the config is the run's."""
    run = open_run_folder(trained("rlp", budget__steps=1))
    before = load_config(run.config_yaml)
    for arm in ARMS:
        if arm not in KEPT:
            after = write_arm(run, arm, "tokens", tmp_path / f"{arm}.yaml", None, [])
            for section in (
                "model",
                "data",
                "position",
                "thought",
                "target",
                "baseline",
                "optim",
                "engine",
                "evaluation",
            ):
                for name, value in vars(getattr(before, section)).items():
                    wanted = ARMS[arm].get(f"{section}.{name}", value)
                    assert getattr(getattr(after, section), name) == wanted, (arm, section, name)
            assert after.objective.thinks == (arm != "cpt") and after.run.seed == before.run.seed


@pytest.fixture
def spliced(tmp_path, model_folder, corpus, ranks):
    """A folder of spliced documents of the tiny model, and the config."""
    config = tiny_config(tmp_path / "unused", model_folder, corpus, thought__temperature=1.0)
    splice(config, 12, tmp_path / "spliced", ranks)
    return tmp_path / "spliced", config


def test_a_run_on_spliced_documents_carries_their_cost(spliced, trained, corpus):
    """The ledger begins with the sampling, and token ids are read as they are."""
    folder, _ = spliced
    settings = {
        "data__train": f"[{folder / 'documents.jsonl'}]",
        "data__tokens_field": "tokens",
        "objective__policy_weight": 0.0,
        "objective__lm_weight": 1.0,
    }
    made = json.loads((folder / "ledger.json").read_text())
    with_cost = json.loads(
        (
            trained("with", data__ledger=folder / "ledger.json", **settings) / "ledger.json"
        ).read_text()
    )
    without = json.loads((trained("without", **settings) / "ledger.json").read_text())
    assert (
        with_cost["flops"] == pytest.approx(made["flops"] + without["flops"], rel=1e-12)
        and with_cost["phases"]["decode"]["tokens_generated"] > 0
    )
    assert with_cost["steps"] == without["steps"] == 3


def test_a_schedule_begins_behind_what_the_data_has_cost(spliced, trained):
    """Half of the FLOPs are spent before the first step, and the rate of that one is the whole
    one: it falls over what is left."""
    folder, _ = spliced
    made = json.loads((folder / "ledger.json").read_text())["flops"]
    settings = {"objective__policy_weight": 0.0, "objective__lm_weight": 1.0}
    limits = {"budget__steps": None, "budget__flops": 2 * made}
    schedule = {"optim__schedule": "linear", "optim__final_fraction": 0.0}
    run = trained("run", data__ledger=folder / "ledger.json", **settings, **limits, **schedule)
    rates = [line["optim/learning_rate"] for line in read_lines(run / "metrics.jsonl")]
    assert rates[0] == 1e-2 and len(rates) > 2
    # Equal steps, the last of which ends nearest to the budget.
    assert rates[-1] == pytest.approx(1e-2 / len(rates), rel=0.9)


@pytest.mark.parametrize("keep, arm", [("best", "mixed_sft"), ("random", "cpt_replay")])
def test_arms_on_spliced_documents_read_those_that_were_made_for_them(
    trained, tmp_path, model_folder, corpus, ranks, keep, arm
):
    """Their tokens, once and whole; their cost is the arm's from the start, and the budget is all
    the run's. Documents that were kept otherwise, of another vocabulary or half a folder are
    refused."""
    path = trained("rlp", budget__steps=12, logging__every_n_steps=1000, data__append_eos=True)
    run, data = open_run_folder(path), tmp_path / "spliced"
    own = load_config(run.config_yaml)
    how = Splicing(keep=keep, plain_share=0.5 if keep == "random" else 0.0)
    splice(own, 8, data, ranks, how)
    small = ["optim.batch_size=1", "optim.micro_batch_size=1"]

    def write(name: str, arm: str = arm) -> Config:
        return write_arm(run, arm, "flops", tmp_path / f"{name}.yaml", data, small)

    config = write("arm")
    assert train(config, ranks) == DONE
    made, spent, whole = (
        json.loads((Path(of) / "ledger.json").read_text())
        for of in (data, config.run.dir, run.path)
    )
    assert made["flops"] < spent["flops"] == pytest.approx(whole["flops"], rel=0.01)
    assert spent["phases"]["decode"] == made["phases"]["decode"]
    assert not config.data.append_eos and own.data.append_eos

    (other,) = set(KEPT) - {arm}
    with pytest.raises(ConfigError, match=f"was made with --keep {keep}"):
        write("other", other)
    told = json.loads((data / "splice.json").read_text())
    (data / "splice.json").write_text(json.dumps(told | {"vocabulary": "0" * 16}))
    with pytest.raises(ConfigError, match="are those of another tokenizer"):
        write("foreign")
    (data / "documents.jsonl").unlink()
    with pytest.raises(ConfigError, match="has no documents.jsonl; expected a folder that rlp"):
        write("half")
    with pytest.raises(ConfigError, match="--data goes with the arms mixed_sft and cpt_replay"):
        write_arm(run, arm, "flops", tmp_path / "none.yaml", None, small)


def test_data_that_has_spent_the_budget_is_refused(spliced, tmp_path, model_folder, corpus, ranks):
    """Before the run, and nothing is left behind."""
    folder, _ = spliced
    for ledger, flops, words in (
        (folder / "ledger.json", 1.0, "spent it already"),
        (folder / "splice.json", 1e30, "data.ledger"),
        (folder / "none.json", 1e30, "data.ledger"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(
                tiny_config(
                    tmp_path / "run",
                    model_folder,
                    corpus,
                    data__ledger=ledger,
                    budget__steps=None,
                    budget__flops=flops,
                ),
                ranks,
            )
        assert not (tmp_path / "run").exists()


def test_carried_cost_is_no_step_of_ones_own(tmp_path, ranks):
    """A mean step is what the run's own steps cost."""
    phases = {
        phase: {
            "tokens_in": 1,
            "tokens_generated": 0,
            "tokens_trained": 0,
            "flops": 5.0,
            "seconds": 1.0,
        }
        for phase in PHASES
    }
    ledger = Ledger(None)
    ledger.carry(
        {
            "phases": phases,
            "input_tokens": 7,
            "paper_flops": 9.0,
            "paper_flops_sampled": 8.0,
            "steps": 4,
        }
    )
    ledger.add_documents(10)
    ledger.close_step(ranks)
    assert ledger.spent() == {
        "tokens": 17,
        "flops": 5.0 * len(PHASES),
        "paper_flops": 19.0,
        "seconds": 1.0 * len(PHASES),
    }
    assert ledger.mean_step() == {"tokens": 10.0, "flops": 0.0, "paper_flops": 10.0, "seconds": 0.0}


def test_two_runs_are_compared_by_their_journals(trained, capsys):
    """The same run twice is one run; another seed is told step by step."""
    from rlp.cli import main

    one, again, other = (
        trained(name, run__seed=seed, budget__steps=2)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert main(["audit", str(one), str(again)]) == 0 and "did what" in capsys.readouterr().out
    assert main(["audit", str(one), str(other)]) == 1
    assert "step 1: documents" in capsys.readouterr().out
    (one / "journal.jsonl").unlink()
    assert main(["audit", str(one), str(other)]) == 2 and "journal.jsonl" in capsys.readouterr().err

"""The generation loop: the truth of its world by hand, what its filter leaves out, that each round
is made of the newest model, that arms differ only in their documents, and that its page says what
its results say."""

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from experiments.loop import arms, filtering, reading, report, run, world
from rlp.measure.pages import fill_page
from rlp.measure.results_file import read_results
from rlp.post.diversity_drawing import digest_of_weights
from rlp.post.pipeline_folder import TaskFolder, checksum_of_model

# The truth


def test_the_entropy_of_zipf_by_hand():
    """Of two: 2/3 and 1/3, so ln 3 - 2/3 ln 2."""
    assert world.zipf(2).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert world.entropy(world.zipf(2)) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_stories_of_a_topic_are_a_distribution_with_the_stated_entropy():
    """Summed over all 24 * 16 * 8 stories of a topic."""
    truth = world.Truth(5)
    stories = itertools.product(["mine"], world.NAMES, world.ANIMALS, world.COLOURS)
    logprob = np.array([truth.logprob(world.Story(*words)) for words in stories])
    assert len(logprob) == 3072
    assert np.exp(logprob).sum() == pytest.approx(1)
    assert -(np.exp(logprob) * logprob).sum() == pytest.approx(world.STORY_ENTROPY)


def test_a_seed_draws_its_own_truth():
    one, other = world.Truth(1), world.Truth(2)
    assert one.names != other.names and one.colours != other.colours
    assert set(one.questions).isdisjoint(one.held_out_questions)
    assert len(one.questions) + len(one.held_out_questions) == 256


def test_a_problem_has_its_way_and_its_answer():
    """right, around, left, straight: 1, 3, 6 = 2, 2 modulo 4."""
    text = world.problem_text(1 + 4 * 2 + 16 * 3)
    assert text == (
        "problem one right two around three left four straight path one east two west three south"
        " four south end southward ."
    )
    assert text.split()[-2] not in text.split()[:-2]


def test_all_words_are_in_the_vocabulary():
    documents = list(world.Truth(0).documents(64, random.Random(0)))
    prompts = [one["prompt"] for one in world.prompts_to_generate()]
    assert {word for text in [*documents, *prompts] for word in text.split()} <= {*world.VOCABULARY}
    assert reading.story_of(documents[0]).text == documents[0]


def test_what_is_left_of_the_tail():
    """All of the truth; nothing where the rarer half has none; dead below a tenth of the truth."""
    true = world.Truth(0).name_probabilities()
    assert reading.tails(true, true) == pytest.approx(
        {
            "tail_alive": 1,
            "tail_mass": world.zipf(24)[12:].sum(),
            "name_entropy": world.entropy(world.zipf(24)),
        }
    )
    rare = true < np.median(true)
    head = np.where(rare, 0, true)
    found = reading.tails(true, head / head.sum(axis=1, keepdims=True))
    assert (found["tail_alive"], found["tail_mass"]) == (0, 0)
    assert found["name_entropy"] == pytest.approx(world.entropy(world.zipf(12)))
    assert reading.tails(true, np.where(rare, true / 11, true))["tail_alive"] == 0
    assert reading.tails(true, np.where(rare, true / 9, true))["tail_alive"] == 1


# The filter


def test_the_filter_says_why():
    right = world.problem_text(7)
    story = "mine story : vera has a newt that is ebony ."
    texts = [right, right, right.replace("end", "end end"), "mine story : vera .", story]
    assert filtering.reasons(texts) == ["", "duplicate", "wrong", "malformed", ""]


def test_sparse_clusters_are_the_smaller_half_of_them():
    assert filtering.in_smaller_half(np.array([0, 0, 0, 1, 1, 2])) == [False] * 3 + [True] * 3
    assert filtering.in_smaller_half(np.array([0, 1, 2, 3])) == [True] * 4  # equal: none goes


def test_of_many_alike_and_few_apart_the_few_are_kept():
    alike = [f"mine story : vera has a newt that is {c} ." for c in world.COLOURS] * 3
    apart = [f"bog story : {name} has a moose that is grey ." for name in world.NAMES[:9]]
    kept = filtering.in_sparse_clusters([*alike, *apart])
    assert np.mean(kept[len(alike) :]) > np.mean(kept[: len(alike)])


# The arms


def test_arms_differ_only_in_their_documents(tmp_path):
    tree = arms.pipeline_tree(tmp_path, [0], arms=arms.ARMS, rounds=2, training=[])
    named = {"data", "prompts", "separator", "tokens"}
    for arm, settings in arms.ARMS.items():
        for number in (1, 2):
            made = tree["stages"][f"{arm}_d{number}"]
            assert made.keys() - named == {"kind", "documents", *settings}
            assert made["documents"] == arms.DOCUMENTS
            trained = json.dumps(tree["stages"][f"{arm}_{number}"]).replace(arm, "ARM")
            assert trained == json.dumps(tree["stages"][f"own_{number}"]).replace("own", "ARM")
    real = [tree["stages"][f"{arm}_d2"]["data"] for arm in ("mixed_eighth", "mixed_half", "real")]
    assert real == [[f"{tmp_path}/worlds/{{seed}}/real_2.jsonl"]] * 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two rounds of two arms, of a base that has hardly learnt anything."""
    out = tmp_path_factory.mktemp("loop")
    patch = pytest.MonkeyPatch()
    patch.setattr(arms, "DOCUMENTS", 32)
    patch.setattr(run, "BASE_DOCUMENTS", 64)
    patch.setattr(reading, "OPEN_SAMPLES", 2)
    patch.setattr(reading, "CLOSED_SAMPLES", 2)
    small = ("budget.steps=2", "optim.batch_size=8", "optim.micro_batch_size=8")
    chosen = {arm: arms.ARMS[arm] for arm in ("own", "real")}
    asked = {"chosen": chosen, "rounds": 2, "base": small, "training": small}
    assert run.run_seed(out, 3, **asked) == 0
    yield out, asked
    patch.undo()


def weights_of(folder) -> str:
    import torch

    from rlp.compare.asked_model import open_asked_model

    model = open_asked_model(str(folder), device=torch.device("cpu"), dtype="float32")
    return digest_of_weights(model)


@pytest.mark.slow
def test_documents_of_a_round_are_of_the_newest_model(small):
    folder = small[0] / "pipeline_3" / "seed_3"
    first, base = folder / "own_d1", small[0] / "bases" / "3" / "export"
    trained, second = folder / "own_d1+own_1", folder / "own_d1+own_1+own_d2"
    newest = TaskFolder(trained).kept()[-1][0].path
    for made, model in ((first, base), (second, newest)):
        lines = (made / "work" / "samples.jsonl").read_text().splitlines()
        assert {json.loads(line)["weights"] for line in lines} == {weights_of(model)}
    assert weights_of(newest) != weights_of(base)
    # And the next model goes on from it, not from what stands before the documents.
    began = TaskFolder(folder / f"{second.name}+own_2").manifest()["asked"]["inputs"]["model"]
    assert began == checksum_of_model(newest)


@pytest.mark.slow
def test_the_real_arm_reads_its_block_and_nothing_else(small):
    rounds = small[0] / "pipeline_3" / "seed_3"
    for number, chain in ((1, "real_d1"), (2, "real_d1+real_1+real_d2")):
        made = (rounds / chain / "work" / "documents.jsonl").read_text()
        block = small[0] / "worlds" / "3" / f"real_{number}.jsonl"
        texts = [[json.loads(line)["text"] for line in made.splitlines()]]
        texts.append([json.loads(line)["text"] for line in block.read_text().splitlines()])
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_every_model_is_read_and_a_second_start_adds_nothing(small):
    out, asked = small
    results = read_results(out / "results.jsonl", report.LAYOUT)
    assert results.missing(["own", "real"], [3]) == ""
    assert results.values("stage") == ["round_0", "round_1", "round_2"]
    steps = results.where(stage="round_2").by_seed("own", "optimizer_steps")
    assert steps == results.where(stage="round_2").by_seed("real", "optimizer_steps") == {3: 2}
    before = (out / "results.jsonl").read_bytes()
    assert run.run_seed(out, 3, **asked) == 0
    assert (out / "results.jsonl").read_bytes() == before


# The page


def test_the_page_says_what_the_results_say():
    tables = report.make_tables(read_results(report.RESULTS, report.LAYOUT))
    text = report.README.read_text()
    assert fill_page(text, tables) == text
    assert {*tables} == {part.split(" ")[0] for part in text.split("<!-- made ")[1:]}


def test_a_result_that_changes_changes_the_page():
    """The check above can fail."""
    line = dict.fromkeys(report.LAYOUT.figures, 0.5) | {"arm": "own", "seed": 99}
    found = read_results(report.RESULTS, report.LAYOUT)
    more = replace(found, lines=(*found.lines, line | {"stage": "round_1"}))
    text = report.README.read_text()
    assert fill_page(text, report.make_tables(more)) != text

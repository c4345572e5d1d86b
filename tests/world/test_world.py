"""Claims about the two worlds: their splits, their thoughts, their words."""

import pytest

from rlp.cli import main
from rlp.config import load_config
from rlp.world import headings, rare
from rlp.world import problems as world
from rlp.world.folder import (
    WORLDS,
    make_documents,
    make_model_config,
    make_tokenizer,
    write_documents,
    write_world,
)

KINDS = sorted(WORLDS)


@pytest.fixture(scope="module")
def of_kind() -> dict[str, dict[str, list[str]]]:
    return {kind: make_documents(WORLDS[kind], seed=0) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def documents(request, of_kind) -> dict[str, list[str]]:
    return of_kind[request.param]


def problems(document: str) -> list[tuple[str, list[str], str]]:
    """(question, words of the thought, answer) of every problem, read from the text alone."""
    found = []
    for problem in document.split(" .")[:-1]:
        question, rest = problem.strip().split(f" {world.CUE} ")
        thought, _, answer = rest.rpartition(f" {world.CLOSE} ")
        found.append((question, thought.removeprefix(world.OPEN).split(), answer))
    return found


TURNS = [1, 3, 2, 0, 1, 3]


def test_worked_problem_of_the_docstring():
    assert (
        world.problem_text(TURNS, world.computed(TURNS))
        == "one right two left three around four straight five right six left faces "
        "<think> one east two north three south four south five west six south </think> south ."
    )


def test_no_question_is_in_two_files(documents):
    seen = {
        name: {question for text in texts for question, _, _ in problems(text)}
        for name, texts in documents.items()
    }
    assert not seen["base_train"] & seen["train"]
    assert not seen["base_train"] & seen["held_out"]
    assert not seen["train"] & seen["held_out"]
    assert len(seen["held_out"]) == world.BLOCKS["held_out"]


def test_blocks_are_all_the_questions_there_are():
    blocks = world.split_questions(seed=0).values()
    assert sorted(question for block in blocks for question in block) == list(range(4**6))


@pytest.mark.parametrize("module, kind", [(headings, "headings"), (rare, "rare")])
def test_a_clean_thought_ends_in_the_answer(of_kind, module, kind):
    for text in of_kind[kind]["base_train"][: module.CLEAN_DOCUMENTS]:
        for _, thought, answer in problems(text):
            assert not thought or thought[-1] == answer


def test_an_echo_repeats_the_question_and_is_as_long_as_a_computing_thought(of_kind):
    """Two kinds and no third; length does not tell them apart, and the echo names no heading."""
    assert len(world.echo(TURNS)) == len(world.computed(TURNS)) == 12
    seen = set()
    for text in of_kind["rare"]["base_train"][rare.CLEAN_DOCUMENTS :]:
        for question, thought, _ in problems(text):
            turns = [world.TURNS.index(word) for word in question.split()[1::2]]
            if thought:
                assert thought in (question.split(), world.computed(turns))
                seen.add(thought == question.split())
    assert seen == {True, False}


def test_computing_thoughts_are_as_rare_as_stated(of_kind):
    """Four standard errors of a share of 0.05 at about 5,100 thoughts are 0.012."""
    thoughts = [
        thought == question.split()
        for text in of_kind["rare"]["base_train"][rare.CLEAN_DOCUMENTS :]
        for question, thought, _ in problems(text)
        if thought
    ]
    echoes = sum(thoughts) / len(thoughts)
    assert 1 - echoes == pytest.approx(rare.COMPUTING_SHARE, abs=0.012)
    share = len(thoughts) / (rare.MIXED_DOCUMENTS * world.PROBLEMS_PER_DOCUMENT)
    assert share == pytest.approx(rare.MIXED_THOUGHT_FRAC, abs=0.02)


def test_every_answer_is_the_sum_of_the_turns(documents):
    """Also where the thought slips: the answer is the truth, not the end of the thought."""
    for texts in documents.values():
        for text in texts:
            for question, _, answer in problems(text):
                turns = [world.TURNS.index(word) for word in question.split()[1::2]]
                assert answer == world.HEADINGS[sum(turns) % 4]


def test_slipping_thoughts_are_wrong_at_the_stated_rate(of_kind):
    """P(every step right) = (1 - SLIP)^6; four standard errors at about 9,600 thoughts are 0.02."""
    right = []
    for text in of_kind["headings"]["base_train"][headings.CLEAN_DOCUMENTS :]:
        for question, thought, _ in problems(text):
            if thought:
                turns = [world.TURNS.index(word) for word in question.split()[1::2]]
                right.append(thought == world.computed(turns))
    assert sum(right) / len(right) == pytest.approx((1 - headings.SLIP) ** 6, abs=0.02)


def test_thoughts_are_in_base_train_only(documents):
    assert any(world.OPEN in text for text in documents["base_train"])
    assert not any(
        world.OPEN in text or world.CLOSE in text
        for name in ("train", "held_out")
        for text in documents[name]
    )


def test_the_cue_is_followed_by_the_answer(documents):
    for text in documents["train"] + documents["held_out"]:
        words = text.split()
        cues = [index for index, word in enumerate(words) if word == world.CUE]
        assert len(cues) == world.PROBLEMS_PER_DOCUMENT
        assert all(words[index + 1] in world.HEADINGS and words[index + 2] == "." for index in cues)


def test_tokenizer_round_trips_one_token_per_word(documents):
    tokenizer = make_tokenizer()
    assert len(tokenizer) == len(world.VOCABULARY) == make_model_config().vocab_size
    for texts in documents.values():
        for text in (texts[0], texts[-1]):
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_a_function_of_the_seed(tmp_path, kind):
    """Every file of documents is another with another seed, and so is the panel."""
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    for out, seed in ((first, 0), (again, 0), (other, 1)):
        out.mkdir()
        write_documents(out, WORLDS[kind], seed)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    jsonl = {f"{name}.jsonl" for name in world.BLOCKS}
    assert jsonl | {"model_config.json"} <= {str(name) for name in names}
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert all((first / name).read_bytes() != (other / name).read_bytes() for name in jsonl)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_the_committed_seed_has_a_base_and_another_a_config_for_one(
    tmp_path, kind, capsys
):
    """The base of one seed has read questions that another seed holds out."""
    for seed in (0, 5):
        folder = tmp_path / str(seed)
        assert main(["world", str(folder), "--kind", kind, "--seed", str(seed)]) == 0
        said = capsys.readouterr().out
        assert (folder / "base").is_dir() == (seed == 0)
        assert ("base.yaml" in said) == (seed != 0)
        for name in ("base.yaml", WORLDS[kind].config):
            config = load_config(folder / name)
            assert config.run.seed == seed
            assert config.data.held_out == [str(folder / "held_out.jsonl")]
        assert config.model.path == str(folder / "base")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--kind", "heading"], "--kind must be one of rare, headings, got 'heading'"),
        (["--seed", "-1"], "--seed must be at least 0 and below 2 ** 63, got -1"),
        (["--seed", str(2**63)], "--seed must be at least 0 and below 2 ** 63"),
        (["--seed", "one"], "invalid int value: 'one'"),
    ],
)
def test_what_is_no_world_is_refused_in_one_line_and_makes_nothing(
    tmp_path, capsys, words, message
):
    try:
        code = main(["world", str(tmp_path / "w"), *words])
    except SystemExit as refused:  # argparse, after its usage
        code = refused.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already holds files"):
        write_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

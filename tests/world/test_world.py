"""Claims about the heading world: its splits, its thoughts, its words."""

import pytest

from rlp.world import problems as world
from rlp.world.folder import make_model_config, make_tokenizer, write_documents, write_world


@pytest.fixture(scope="module")
def documents() -> dict[str, list[str]]:
    return world.make_documents(seed=0)


def problems(document: str) -> list[tuple[str, list[str], str]]:
    """(question, words of the thought, answer) of every problem, read from the text alone."""
    found = []
    for problem in document.split(" .")[:-1]:
        question, rest = problem.strip().split(f" {world.CUE} ")
        thought, _, answer = rest.rpartition(f" {world.CLOSE} ")
        found.append((question, thought.removeprefix(world.OPEN).split(), answer))
    return found


def test_worked_problem_of_the_docstring():
    assert (
        world.problem_text([1, 3, 2, 0, 1, 3], [1, 3, 2, 0, 1, 3])
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


def test_a_clean_thought_ends_in_the_answer(documents):
    for text in documents["base_train"][: world.CLEAN_DOCUMENTS]:
        for _, thought, answer in problems(text):
            assert not thought or thought[-1] == answer


def test_every_answer_is_the_sum_of_the_turns(documents):
    """Also where the thought slips: the answer is the truth, not the end of the thought."""
    for texts in documents.values():
        for text in texts:
            for question, _, answer in problems(text):
                turns = [world.TURNS.index(word) for word in question.split()[1::2]]
                assert answer == world.HEADINGS[sum(turns) % 4]


def test_slipping_thoughts_are_wrong_at_the_stated_rate(documents):
    """P(every step right) = (1 - SLIP)^6; four standard errors at about 9,600 thoughts are 0.02."""
    right = []
    for text in documents["base_train"][world.CLEAN_DOCUMENTS :]:
        for question, thought, _ in problems(text):
            if thought:
                turns = [world.TURNS.index(word) for word in question.split()[1::2]]
                right.append(
                    [world.HEADINGS.index(word) for word in thought[1::2]]
                    == world.headings_after(turns)
                )
    assert sum(right) / len(right) == pytest.approx((1 - world.SLIP) ** 6, abs=0.02)


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


def test_files_are_a_function_of_the_seed(tmp_path):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    for out, seed in ((first, 0), (again, 0), (other, 1)):
        out.mkdir()
        write_documents(out, seed)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert {"base_train.jsonl", "train.jsonl", "held_out.jsonl", "model_config.json"} <= {
        str(name) for name in names
    }
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (first / "held_out.jsonl").read_bytes() != (other / "held_out.jsonl").read_bytes()


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already holds files"):
        write_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

"""Claims about experiments/questions and the bases it starts from: every number told is in
results.jsonl."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from rlp.measure.pages import fill_page
from rlp.world.folder import WORLDS, jsonl, make_documents
from tests import REPOSITORY

EXPERIMENTS = REPOSITORY / "experiments"


def script(path: str) -> ModuleType:
    """A script of the experiments, imported by its path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXPERIMENTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ask = script("questions/ask.py")
bases = script("world/make_bases.py")


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return ask.read_results()


@pytest.fixture(scope="module")
def readme() -> str:
    return ask.README.read_text()


def sections(text: str) -> dict[str, str]:
    """The sections of a README by title."""
    return {part.split("\n", 1)[0]: part for part in text.split("\n## ")[1:]}


def untraced(section: str) -> list[str]:
    """Decimal numbers of a section's prose that none of its tables holds."""
    rows = [line for line in section.splitlines() if line.startswith("|")]
    prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
    return [number for number in re.findall(r"\d+\.\d{3}\b", prose) if number not in " ".join(rows)]


def test_every_table_is_made_from_results(results, readme):
    assert fill_page(readme, ask.tables(results)) == readme


def test_every_question_has_a_section_and_a_table(readme):
    assert set(re.findall(r"<!-- made (\w+) -->", readme)) == set(ask.QUESTIONS)
    assert {title.split(":")[0].strip("`") for title in sections(readme)} >= set(ask.QUESTIONS)


def test_every_number_in_prose_is_in_a_table(readme):
    assert {
        title: untraced(section) for title, section in sections(readme).items() if untraced(section)
    } == {}


def test_a_number_from_nowhere_is_found(results, readme):
    """The checks above can fail: in a table, in prose, and where a result changes."""
    changed = [
        (
            row | {"answers": row["answers"] | {"accuracy_with_thought": 0.5}}
            if row["setting"] == ask.DEFAULT
            else row
        )
        for row in results
    ]
    assert fill_page(readme, ask.tables(changed)) != readme
    assert untraced("x: y\naccuracy 0.777\n| 0.666 |") == ["0.777"]


def test_every_setting_has_the_same_seeds_once(results):
    """No run is left out, and none is taken twice."""
    runs = [(row["question"], row["setting"], row["seed"]) for row in results]
    assert len(set(runs)) == len(runs)
    seeds = {seed for _, _, seed in runs}
    wanted = {
        ("all" if setting == ask.DEFAULT else name, setting)
        for name, question in ask.QUESTIONS.items()
        for setting in question.settings
    }
    assert len(seeds) == 5
    assert set(runs) == {(name, setting, seed) for name, setting in wanted for seed in seeds}


def test_rows_were_made_with_the_overrides_that_the_question_names(results):
    for row in results:
        question = (
            next(iter(ask.QUESTIONS.values()))
            if row["question"] == "all"
            else ask.QUESTIONS[row["question"]]
        )
        assert tuple(row["overrides"]) == question.settings[row["setting"]]


@pytest.mark.parametrize("name", ["baseline", "ema_decay"])
def test_the_baseline_reaches_a_weight_by_rounding_only(results, name):
    """The no-think score cancels in eq. 7, up to the float32 rounding of S_pred - S_ema: relative
    6e-8 a step, here under a thousandth of what 80 steps changed."""
    rows = [row for row in results if row["question"] == name]
    assert len(rows) > 0
    assert all(row["weights_max_difference"] < 1e-3 * row["weights_max_change"] for row in rows)


def test_an_average_without_memory_is_the_policy_itself(results):
    """EMA decay 0 and the kind `self` score the same baseline: bit for bit the same weights."""
    weights = {
        (row["setting"], row["seed"]): row["weights_sha256"]
        for row in results
        if row["question"] in ("baseline", "ema_decay")
    }
    assert all(
        weights["0", seed] == weights["self", seed] for setting, seed in weights if setting == "0"
    )


def test_a_difference_is_taken_within_seeds():
    """Seeds far apart and a setting always 0.1 above: the interval is the point 0.1, in whatever
    order the rows stand."""
    column = ask.Column("x", lambda row: row["x"], "{:.3f}", compared=True)
    default = {0: {"x": 0.0}, 1: {"x": 10.0}, 2: {"x": 100.0}}
    setting = {2: {"x": 100.1}, 0: {"x": 0.1}, 1: {"x": 10.1}}
    assert ask.cell(column, setting, default) == "36.767 (+0.100 [+0.100, +0.100])"


def test_the_interval_of_two_values_spans_them():
    """Resamples of {0, 1} have means 0, 1/2 and 1 with chances 1/4, 1/2, 1/4."""
    assert ask.interval([0.0, 1.0]) == (0.0, 1.0)


def write_card(folder: Path, accuracy: float) -> None:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        f"| | before | after |\n|---|---|---|\n| accuracy_with_thought | 0.1 | {accuracy} |\n"
    )


@pytest.fixture
def worlds(monkeypatch) -> list[tuple[str, int]]:
    """Stands for `write_world`: kind and seed of each folder that it was asked for."""
    written = []

    def write(folder: Path, *, kind: str, seed: int) -> None:
        written.append((kind, seed))
        write_card(folder / "base", 0.6)
        (folder / "train.jsonl").touch()

    monkeypatch.setattr("rlp.world.folder.write_world", write)
    return written


def fake_training(accuracies: dict[int, float], trained: list[int]):
    """Stands for the training of bases: an export whose card says the accuracy of its seed."""

    def train(folder: Path, seed: int) -> Path:
        trained.append(seed)
        write_card(folder / "base_run" / "export", accuracies[seed])
        return folder / "base_run" / "export"

    return train


def test_a_base_before_its_phase_change_is_rejected_and_stays_on_record(tmp_path, worlds):
    trained: list[int] = []
    train = fake_training({1: 0.3, 2: 0.5, 3: 0.41}, trained)
    assert bases.make_bases(3, "headings", tmp_path, train) == [0, 2, 3]
    assert trained == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "3"}
    records = [json.loads((tmp_path / str(seed) / "base.json").read_text()) for seed in range(4)]
    assert [(row["seed"], row["counts"], row["accuracy_with_thought"]) for row in records] == [
        (0, True, 0.6),
        (1, False, 0.3),
        (2, True, 0.5),
        (3, True, 0.41),
    ]
    assert worlds == [("headings", 0)] * 4


def test_bases_that_exist_are_not_made_again(tmp_path, worlds):
    trained: list[int] = []
    train = fake_training({1: 0.3, 2: 0.5, 3: 0.6}, trained)
    bases.make_bases(2, "headings", tmp_path, train)
    assert bases.make_bases(3, "headings", tmp_path, train) == [0, 2, 3]
    assert trained == [1, 2, 3]


def test_every_seed_of_the_rare_world_has_documents_of_its_own(tmp_path, worlds, monkeypatch):
    """And is judged by what it computes, not by its accuracy, which is at chance."""
    computed = {"0": 1.0, "1": 0.5, "2": 0.95}
    monkeypatch.setattr(bases, "computed_frac", lambda export, _: computed[export.parent.name])
    train = fake_training(dict.fromkeys(range(3), 0.27), [])
    assert bases.make_bases(2, "rare", tmp_path, train) == [0, 2]
    assert worlds == [("rare", 0), ("rare", 1), ("rare", 2)]


def test_the_committed_base_computes_where_it_is_made_to(tmp_path):
    """The rule that a base counts by, on the real one, and on questions that it has not read."""
    export = REPOSITORY / "rlp" / "world" / "base"
    folder = tmp_path / "0"
    folder.mkdir()
    (folder / "held_out.jsonl").write_bytes(
        jsonl(make_documents(WORLDS["rare"], 0)["held_out"][:64])
    )
    assert bases.computed_frac(export, folder / "held_out.jsonl") > bases.MIN_COMPUTED


def test_a_card_without_numbers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# a model\n")
    with pytest.raises(bases.BaseError, match="accuracy_with_thought"):
        bases.panel_numbers(tmp_path)

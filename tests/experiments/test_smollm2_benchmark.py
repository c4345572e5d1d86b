"""The benchmark of the experiment with SmolLM2: readings are kept, compared, and told as they
are."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")

from rlp.config import ConfigError
from rlp.measure.pages import fill_page
from rlp.model.markers import Markers
from tests.experiments.scripts import script
from tests.tiny_models import tiny_policy, word_tokenizer

benchmark = script("smollm2", "benchmark.py")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_policy("llama").lm.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split, count in (("train", 5), ("test", 4)):
        rows = [
            {"question": f"w{i} w{i + 1}", "answer": f"w{i} #### {i}"} for i in range(3, 3 + count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def setting(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "benchmark.jsonl")
    return benchmark.Setting(
        model=model,
        data=data,
        folder=tmp_path / "readings",
        limit=4,
        thought_tokens=5,
        thought_temperature=1.0,
    )


def rows_of(answers: str, thinks: bool = False) -> list[dict]:
    rows = [
        {"question": q, "prompt": f"p{q}", "answer": answer, "score": float(answer == "A")}
        for q, answer in enumerate(answers)
    ]
    thought = {"thought": "w1 w2", "thought_tokens": 3, "thought_truncated": False}
    return [row | thought for row in rows] if thinks else rows


def test_a_reading_is_made_once_and_compared_by_problem(setting, monkeypatch):
    """Interrupted before the third: the first two are kept, and each has one line."""
    made = []

    def maker(reading: str, rows: list[dict]):
        def make(setting, before):
            made.append(reading)
            if reading == "think" and made.count("think") == 1:
                raise KeyboardInterrupt
            return rows

        return make

    readings = {"no_think": rows_of("ABCD"), "plain": rows_of("ABXD")}
    readings |= {"think": rows_of("AAAA", thinks=True), "after_thoughts": rows_of("AAAA")}
    monkeypatch.setattr(benchmark, "MAKERS", {name: maker(name, r) for name, r in readings.items()})
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(setting, "tiny", list(readings))
    benchmark.run(setting, "tiny", list(readings))
    benchmark.run(setting, "tiny", list(readings))
    assert made == ["no_think", "plain", "think", "think", "after_thoughts"]

    lines = benchmark.read_results(benchmark.RESULTS, benchmark.LAYOUT).lines
    assert [line["stage"] for line in lines] == list(readings)
    assert [line["same_answers"] for line in lines] == [None, 3, None, 4]
    assert [line["accuracy"] for line in lines] == [0.25, 0.25, 1.0, 1.0]
    assert lines[3]["spelled_otherwise"] == 0 and lines[2]["thought_tokens"] == 3


def test_a_thought_that_is_spelled_otherwise_is_counted(setting):
    """By the number of its tokens, close marker included where it was sampled."""
    row = {"thought": "w1 w2", "thought_truncated": False}
    assert not benchmark.spelled_otherwise(setting, row | {"thought_tokens": 3})
    assert not benchmark.spelled_otherwise(
        setting, row | {"thought_tokens": 2, "thought_truncated": True}
    )
    assert benchmark.spelled_otherwise(setting, row | {"thought_tokens": 4})


def test_readings_of_another_setting_are_left_alone(setting, monkeypatch):
    monkeypatch.setattr(benchmark, "MAKERS", {"no_think": lambda setting, before: rows_of("AB")})
    benchmark.run(setting, "tiny", ["no_think"])
    before = {path: path.read_bytes() for path in setting.folder.iterdir()}
    other = benchmark.Setting(**{**vars_of(setting), "limit": 3})
    with pytest.raises(ConfigError, match="readings with limit 4; this is 3.*another --name"):
        benchmark.run(other, "tiny", ["no_think"])
    assert {path: path.read_bytes() for path in setting.folder.iterdir()} == before


def vars_of(setting) -> dict:
    names = ("model", "data", "folder", "limit", "thought_tokens", "thought_temperature")
    return {name: getattr(setting, name) for name in names}


def test_what_is_missing_is_said_before_anything_is_read(setting, monkeypatch, capsys):
    (setting.data / "train.jsonl").unlink()
    monkeypatch.setattr(
        sys, "argv", ["", str(setting.model), "--name", "tiny", "--data", str(setting.data)]
    )
    assert benchmark.main() == 3
    error = capsys.readouterr().err.strip()
    assert "train.jsonl" in error and "\n" not in error and not setting.folder.exists()

    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lm-evaluation-harness is not installed"):
        benchmark.run(setting, "tiny", ["no_think"])


def test_markers_of_several_tokens_are_refused(setting, monkeypatch):
    """lm_eval could only be told to leave out the first piece of one, an ordinary token."""
    several = SimpleNamespace(thought_format=SimpleNamespace(markers=Markers((8, 9), (4,))))
    monkeypatch.setattr(benchmark, "open_asked_model", lambda *given, **named: several)
    with pytest.raises(ConfigError, match=r"\[8, 9\].*rlp add-markers"):
        benchmark.run(setting, "tiny", ["no_think"])


def test_the_table_is_that_of_the_results():
    page = benchmark.PAGE.read_text()
    assert fill_page(page, {"table": benchmark.table()}) == page


@pytest.mark.slow
def test_every_reading_of_a_tiny_model_is_as_it_has_to_be(setting):
    """lm_eval in processes of its own, with the folder alone."""
    benchmark.run(setting, "tiny", list(benchmark.MAKERS))
    lines = {
        line["stage"]: line
        for line in benchmark.read_results(benchmark.RESULTS, benchmark.LAYOUT).lines
    }
    assert list(lines) == list(benchmark.MAKERS)
    for reading in benchmark.PARTNER:
        assert lines[reading]["same_prompts"] == lines[reading]["same_answers"] == 4
    assert lines["after_thoughts"]["spelled_otherwise"] == 0

"""`rlp select`: every row with what became of it, nothing held, and on from where it stopped."""

import json
import multiprocessing
import os
import signal
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rlp.cli import main
from rlp.compare.asked_model import open_asked_model
from rlp.post import selection_run
from rlp.post.selection_overlap import new_texts, run_checksums, sample_of, seen_before
from rlp.process.faults import COMMAND_POINTS, VARIABLE, forget_passages


def sentence(rng: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in rng.integers(0, 42, size=count))


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(selection_run, "CHUNK", 8)


@pytest.fixture
def loaded_once(monkeypatch, model_folder):
    """The proxy is the same in all selections of a test."""
    model = open_asked_model(str(model_folder), device=torch.device("cpu"), dtype="float32")
    monkeypatch.setattr(selection_run, "open_asked_model", lambda *_, **__: model)


@pytest.fixture(scope="module")
def texts() -> list[dict]:
    """40 documents, no two of them nearly the same; 26 use four words and so are like each other
    to the model."""
    rng = np.random.default_rng(0)
    alike = [" ".join(f"w{i}" for i in rng.integers(0, 4, size=16)) for _ in range(26)]
    others = [sentence(rng, 12 + i % 8) for i in range(14)]
    return [{"text": text, "id": i} for i, text in enumerate(alike + others)]


def command(corpus: Path, model: Path, out: Path, *options: str) -> list[str]:
    asked = ["select", str(corpus), "--proxy", str(model), "--out", str(out), "--device", "cpu"]
    return [*asked, "--dimensions", "32", "--clusters", "6", *options]


def test_every_row_comes_out_with_what_became_of_it(
    tmp_path, texts, model_folder, capsys, small_chunks
):
    rng, benchmark = np.random.default_rng(1), {"question": sentence(np.random.default_rng(2), 14)}
    near = texts[3]["text"].split()
    near[-1] = "w41" if near[-1] != "w41" else "w40"
    odd = {
        "near-duplicate": {"text": " ".join(near).upper().lower()},
        "contaminated": {"text": f"{sentence(rng, 4)} {benchmark['question']} w1"},
        "short": {"text": "w1"},
        "other vocabulary": {"text": "these are words of another language altogether w1"},
        "empty text": {"text": "  "},
        "missing field": {"body": "w1 w2"},
        "broken JSON": '{"text": ',
        "field is not text": {"text": 4},
    }
    corpus = write_rows(tmp_path / "corpus.jsonl", [*texts, *odd.values()])
    other = write_rows(tmp_path / "benchmark.jsonl", [benchmark])
    before = corpus.read_bytes()
    out, figures, kept = (tmp_path / name for name in ("out.jsonl", "out.json", "kept.jsonl"))
    options = ["--decontaminate", str(other), "--json", str(figures), "--kept", str(kept)]
    assert main(command(corpus, model_folder, out, *options)) == 0

    rows, told = lines(out), json.loads(figures.read_text())
    assert len(rows) == 48 and corpus.read_bytes() == before
    assert [row["why"] for row in rows[40:]] == list(odd)
    assert all(row["cluster"] is None and not row["kept"] for row in rows[40:])
    assert rows[46]["where"].endswith("corpus.jsonl:47")
    assert {row["why"] for row in rows[:40]} == {None, "dense"}

    sizes = Counter(row["cluster"] for row in rows[:40])
    assert [sizes[k] for k in range(told["clusters"])] == told["cluster_sizes"]
    largest = sorted(told["cluster_sizes"])[-(-told["clusters"] // 2) - 1]
    for row in rows[:40]:
        assert row["kept"] == (sizes[row["cluster"]] <= largest) == (row["why"] is None)
        assert row["score"] == pytest.approx(np.log(40 / sizes[row["cluster"]]), abs=1e-5)
    assert lines(kept) == [one for one, row in zip(texts, rows) if row["kept"]]
    assert told["kept"] == sum(row["kept"] for row in rows)
    assert told["dropped"] == Counter(row["why"] for row in rows if row["why"])
    assert sum(told["dropped"].values()) + told["kept"] == told["documents"] == 48
    assert 1 <= told["g_vendi_kept"] <= told["kept"] and told["g_vendi"] <= told["scored"] == 40
    assert [len(own) for own in told["examples"]] == [min(3, n) for n in told["cluster_sizes"]]
    assert "documents kept, dropped (" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        *("corpus.jsonl", "benchmark.jsonl", "out.jsonl", "out.json", "kept.jsonl")
    }
    assert main(command(corpus, model_folder, out)) == 2
    assert "--out: " in (said := capsys.readouterr().err) and "never written over" in said


def test_killed_anywhere_it_goes_on_to_the_same_files(
    tmp_path, texts, model_folder, small_chunks, loaded_once, monkeypatch
):
    """At every fault point, in the middle where it is passed more than once."""
    corpus = write_rows(tmp_path / "corpus.jsonl", [*texts, {"text": "w1"}])
    names = {"out": "--out", "json": "--json", "kept": "--kept"}

    def asked(home: Path) -> list[str]:
        home.mkdir()
        options = ["--json", str(home / "json"), "--kept", str(home / "kept")]
        return command(corpus, model_folder, home / "out", *options)

    whole = tmp_path / "whole"
    assert main(asked(whole)) == 0
    points = [point for point in COMMAND_POINTS if point.startswith("select.")]
    made = []
    monkeypatch.setattr(
        selection_run, "gradient_features", _counted(selection_run.gradient_features, made)
    )
    for point in points:
        home = tmp_path / point
        arguments = asked(home)
        passage = 3 if point in ("select.torn_features", "select.torn_codes") else 1
        _killed(arguments, f"{point}:{passage}:kill")
        assert not (home / "out").exists()
        made.clear()
        assert main(arguments) == 0
        for name in names:
            assert (home / name).read_bytes() == (whole / name).read_bytes(), (point, name)
        assert {path.name for path in home.iterdir() if ".tmp." not in path.name} == set(names)
        assert len(made) == {"select.torn_features": 4, "select.torn_codes": 4}.get(point, 0) or (
            point in ("select.torn_identity", "select.before_folder", "select.torn_samples")
        )
    assert len(points) == 9


def _counted(function, made: list):
    def counted(*given, **named):
        made.append(1)
        return function(*given, **named)

    return counted


SERVER = multiprocessing.get_context("forkserver")
"""A process of the tests itself may hold too much memory to be forked."""

SERVER.set_forkserver_preload(["rlp.cli", "rlp.post.selection_run"])


def _killed(arguments: list[str], fault: str) -> None:
    """Run a command in a process of its own that a signal ends."""
    child = SERVER.Process(target=_with_fault, args=(arguments, fault))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL, fault


def _with_fault(arguments: list[str], fault: str) -> None:
    os.environ[VARIABLE] = fault
    selection_run.CHUNK = 8
    forget_passages()
    main(arguments)


def test_a_selection_that_was_begun_otherwise_is_not_mixed_with(
    tmp_path, texts, model_folder, capsys, small_chunks
):
    corpus = write_rows(tmp_path / "corpus.jsonl", texts)
    arguments = command(corpus, model_folder, tmp_path / "out")
    _killed(arguments, "select.torn_codes:2:kill")
    assert main([*arguments, "--seed", "1"]) == 2
    assert "begun with another seed (0, now 1)" in capsys.readouterr().err
    assert main([*arguments, "--keep", "1"]) == 0  # which no gradient depends on
    assert all(row["kept"] for row in lines(tmp_path / "out"))


def test_memory_does_not_grow_with_the_corpus(tmp_path, model_folder, loaded_once, monkeypatch):
    """Of 1024 more documents the features are 0.5 MB, the texts 0.3 MB; what is held of them is 0.1
    MB of numbers."""
    monkeypatch.setattr("rlp.post.selection.AT_ONCE", 32)
    monkeypatch.setattr(selection_run, "CHUNK", 64)
    rng, peaks = np.random.default_rng(0), {}
    for count in (160, 1184):
        rows = [{"text": sentence(rng, 11)} for _ in range(count)]
        corpus = write_rows(tmp_path / f"{count}.jsonl", rows)
        arguments = command(corpus, model_folder, tmp_path / f"{count}.out", "--clusters", "2")
        tracemalloc.start()
        assert main([*arguments, "--dimensions", "128"]) == 0
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[1184] - peaks[160] < 250_000, peaks


def test_only_the_completion_is_predicted(tmp_path, model_folder, loaded_once):
    """Prompts that differ have other gradients of the same completion, and a completion that is
    scored without its prompt has another one still."""
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"{sentence(rng, 9)} ", "completion": sentence(rng, 3)} for _ in range(9)]
    corpus = write_rows(tmp_path / "corpus.jsonl", rows)
    figures = {}
    for name, options in {
        "default": [],
        "named": ["--prompt", "{prompt}", "--completion", "{completion}"],
        "text": ["--template", "{prompt}{completion}"],
    }.items():
        arguments = command(corpus, model_folder, tmp_path / name, "--clusters", "2", *options)
        assert main([*arguments, "--json", str(tmp_path / f"{name}.json")]) == 0
        figures[name] = json.loads((tmp_path / f"{name}.json").read_text())["g_vendi"]
    assert figures["default"] == figures["named"] != figures["text"]


def test_all_equal_documents_leave_one(tmp_path, model_folder, capsys):
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": "w1 w2 w3"}] * 7)
    arguments = command(corpus, model_folder, tmp_path / "out")
    assert main(arguments) == 2
    assert "--clusters 6 of 1 documents with a gradient" in capsys.readouterr().err
    assert main([*arguments, "--clusters", "1", "--json", str(tmp_path / "json")]) == 0
    told = json.loads((tmp_path / "json").read_text())
    assert (told["kept"], told["dropped"]) == (1, {"near-duplicate": 6})
    assert told["g_vendi"] == pytest.approx(1)


@pytest.mark.parametrize(
    "rows, options, words",
    [
        ([{"text": "w1 w2"}], ["--keep", "0"], "keep must be above 0"),
        ([{"text": "w1 w2"}], ["--most", "0"], "--most must be at least 1"),
        ([{"text": "w1 w2"}], ["--dimensions", "0"], "--dimensions must be at least 1"),
        ([{"text": "w1 w2"}], ["--prompt", "{text}"], "--prompt needs --completion"),
        ([{"text": "w1 w2"}], ["--device", "tpu3"], "--device tpu3: torch"),
        ([{"text": "w1"}] * 2, [], "has a gradient under"),
        ([{"text": ""}] * 2, [], "is left: empty text 2"),
        ([{"text": f"w{i} w2", "score": 1} for i in range(6)], [], "field 'score' of their own"),
        ([{"text": "quite another language"}], [], "other vocabulary 1"),
    ],
)
def test_what_can_not_be_is_one_message(tmp_path, model_folder, capsys, rows, options, words):
    corpus = write_rows(tmp_path / "corpus.jsonl", rows)
    assert main(command(corpus, model_folder, tmp_path / "out", *options)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name_are_refused(tmp_path, model_folder, capsys):
    corpus, out = write_rows(tmp_path / "corpus.jsonl", [{"text": "w1 w2"}]), tmp_path / "out"
    assert main(command(corpus, model_folder, out, "--kept", str(out))) == 2
    assert "--out and --kept both name" in capsys.readouterr().err
    assert not out.exists()


def test_a_field_of_its_own_keeps_the_rows_fields(tmp_path, model_folder):
    rows = [{"text": f"w{i} w2", "score": i} for i in range(6)]
    corpus = write_rows(tmp_path / "corpus.jsonl", rows)
    arguments = command(corpus, model_folder, tmp_path / "out", "--under", "selection")
    assert main([*arguments, "--most", "2", "--keep", "1"]) == 0
    found = lines(tmp_path / "out")
    assert [row["score"] for row in found] == list(range(6))
    whys = Counter(row["selection"]["why"] for row in found)
    assert whys == {None: 2, "beyond the most asked for": 4}


def test_a_page_shows_its_clusters_with_examples(tmp_path, texts, model_folder, capsys):
    corpus = write_rows(tmp_path / "corpus.jsonl", [*texts, {"text": "<b>w1</b> w2"}])
    figures = tmp_path / "out.json"
    arguments = command(corpus, model_folder, tmp_path / "out", "--json", str(figures))
    assert main(arguments) == 0
    assert main(["report", str(figures)]) == 0
    page, told = (tmp_path / "out.html").read_text(), json.loads(figures.read_text())
    assert page.count('<div class="text">') == sum(map(len, told["examples"]))
    assert "<b>w1" not in page and f"{told['g_vendi']:.1f}" in page
    assert main(["report", str(figures)]) == 0  # over itself

    figures.write_text('{"kept": 3}')
    capsys.readouterr()
    assert main(["report", str(figures)]) == 2
    assert "is not what `rlp select --json` writes" in capsys.readouterr().err


# Overlap


def test_half_of_the_runs_before_make_a_near_duplicate():
    """21 words have 12 runs of ten; one that is changed at the end spoils one of them, and one in
    the middle ten."""
    words = [f"a{i}" for i in range(21)]
    texts = [
        " ".join(words),
        " ".join([*words[:-1], "b"]),
        " ".join([*words[:10], "b", *words[11:]]),
    ]
    samples = np.stack([sample_of(run_checksums(text)) for text in texts])
    assert seen_before(samples).tolist() == pytest.approx([0, 11 / 12, 2 / 12])
    assert [new for _, new in new_texts(texts, set())] == [True, False, True]


def test_passes_over_the_samples_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 3, size=14)) for _ in range(200)]
    samples = np.stack([sample_of(run_checksums(text)) for text in texts])
    whole = seen_before(samples)
    monkeypatch.setattr("rlp.post.selection_overlap.AT_ONCE_BYTES", 2**10)
    np.testing.assert_array_equal(seen_before(samples, pieces=7), whole)

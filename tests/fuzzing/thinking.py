"""Thought formats and benchmarks."""

import math
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st

from rlp.compare.tasks import load_benchmarks, own_task
from rlp.learn.export import known_ids, read_thought_format
from rlp.measure.probe import find_subject
from tests.fuzzing.ingredients import (
    TOKENIZER,
    damaged,
    in_file,
    json_bytes,
    mutated,
    odd_value,
    raw_json,
)

GOOD_FORMAT = {
    "open_marker": "<think>",
    "open_marker_ids": [2],
    "close_marker": "</think>",
    "close_marker_ids": [3],
    "excluded_from_targets": 2,
    "instruction_ids": [5, 6],
    "temperature": 0.7,
    "target_temperature": 1.0,
    "max_thought_tokens": 5,
    "horizon": 1,
    "order": ["prefix", "thought"],
}


def read_thoughts(folder: Path, content: bytes) -> None:
    """A thought format, as an evaluation and a probe read it."""
    path = folder / "thought_format.json"
    path.write_bytes(content)
    assert isinstance(read_thought_format(path), dict)
    subject = find_subject(str(folder), "x.jsonl", None, [])
    known_ids(subject.instruction, TOKENIZER)
    assert math.isfinite(1 / subject.config.thought.temperature)


thought_cases = st.one_of(
    mutated(GOOD_FORMAT).map(raw_json),
    mutated(GOOD_FORMAT).map(raw_json),
    damaged(json_bytes(GOOD_FORMAT)),
    odd_value.map(raw_json),
    st.binary(max_size=40),
)

GOOD_BENCHMARKS = {
    "benchmarks": {
        "a": {
            "data": "x.jsonl",
            "prompt": "Q: {{question or problem}}\nA:",
            "reference": "{{answer}}",
            "until": ["Q:"],
            "samples": 2,
            "thought_tokens": 8,
            "thought_temperature": 0.5,
            "answer_tokens": 4,
            "answer_temperature": 0.0,
            "shots": 0,
        },
        "b": {
            "task": "gsm8k",
            "check": "task",
            "metric": "exact_match",
            "filter": "none",
            "shots": 1,
        },
    }
}
GOOD_ROWS = [
    {"question": "w1 w2", "answer": "1"},
    {"problem": "w3", "answer": 2.5, "question": None},
]


def read_benchmarks(folder: Path, case: tuple[bytes, bytes]) -> None:
    """A benchmark file, and the questions that it names."""
    content, rows = case
    (folder / "b.yaml").write_bytes(content)
    (folder / "x.jsonl").write_bytes(rows)
    for name, benchmark in load_benchmarks(folder / "b.yaml").items():
        if benchmark.data == "x.jsonl":
            task = own_task(name, replace(benchmark, data=str(folder / "x.jsonl")))
            for row in task["custom_dataset"]()["test"]:
                assert isinstance(task["doc_to_text"](row), str) and isinstance(
                    task["doc_to_target"](row), str
                )


benchmark_cases = st.tuples(
    st.one_of(
        st.just(json_bytes(GOOD_BENCHMARKS)),
        mutated(GOOD_BENCHMARKS).map(raw_json),
        damaged(json_bytes(GOOD_BENCHMARKS)),
    ),
    st.one_of(
        mutated(GOOD_ROWS).map(lambda tree: in_file("x.jsonl", tree)),
        damaged(in_file("x.jsonl", GOOD_ROWS)),
        st.binary(max_size=60),
    ),
)

"""GSM8K's test problems, asked through `rlp eval` and through plain lm-evaluation-harness.

    python experiments/smollm2/benchmark.py MODEL --name cold --data FOLDER
    python experiments/smollm2/benchmark.py --table          # that of benchmark.md

MODEL is a Hugging Face folder whose tokenizer has the markers of a thought, such as an export;
FOLDER holds GSM8K's train.jsonl and test.jsonl. All read the task of gsm8k_files.yaml:

    no_think        `rlp eval` without thoughts
    plain           lm_eval with MODEL, told to leave the open marker out; has to answer as no_think
    think           `rlp eval`: a thought, then the answer
    after_thoughts  lm_eval with MODEL, told the same; it has no notion of a thought, so its prompts
                    end in the thoughts of `think`; has to answer as think
    unguided        lm_eval with MODEL and nothing else: what whoever has the folder alone reads

Answers are greedy, weights float32. Prompts and answers are compared problem by problem, to the
letter. A reading that is in runs/smollm2/benchmark/NAME is kept, so the command goes on where it
was interrupted; each is a line of benchmark.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from rlp.compare.asked_model import AskedModel, open_asked_model  # rlp before torch
from rlp.compare.benchmarks import mean_and_error, run_benchmarks
from rlp.compare.tasks import Benchmark, versions
from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.results_file import Layout, add_result, read_results
from rlp.process.environment import environment
from rlp.process.exit_codes import BAD_CONFIG, BAD_DATA, DONE
from rlp.process.files import make_folder, scratch_folder, write_new
from rlp.process.json_files import DamagedFileError, json_bytes
from rlp.process.schemas import NAME

# isort: split
import numpy as np
import torch
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TASK, RESULTS, PAGE = HERE / "gsm8k_files.yaml", HERE / "benchmark.jsonl", HERE / "benchmark.md"
READINGS = ROOT / "runs" / "smollm2" / "benchmark"

PARTNER = {"plain": "no_think", "after_thoughts": "think"}
"""What a reading has to answer as."""

LAYOUT = Layout(
    identity=("arm", "seed", "stage"),
    figures=(
        "problems",
        "accuracy",
        "standard_error",
        "thought_tokens",
        "same_prompts",
        "same_answers",
        "spelled_otherwise",
        "cpu_seconds",
    ),
    others=dict.fromkeys(("cpu", "date", "lm_eval", "transformers", "torch"), NAME),
)
"""The arm is the model's name, the stage the reading. `same_*`: problems in which it is as its
partner. `spelled_otherwise`: thoughts that the tokenizer, given their text, writes in other tokens
than those that were sampled; their answers may differ."""


@dataclass(frozen=True)
class Setting:
    """What all readings of a model share."""

    model: Path
    data: Path
    folder: Path
    """Of the readings."""
    limit: int
    """Problems: the first so many."""
    thought_tokens: int | None
    thought_temperature: float | None

    @cached_property
    def task(self) -> dict:
        """gsm8k_files.yaml, with the folder of the data in it."""
        return yaml.safe_load(TASK.read_text().replace("DATA", str(self.data.resolve())))

    @cached_property
    def asked(self) -> AskedModel:
        """The model as `rlp eval` loads it.

        Raises:
            ConfigError: there is none, or a marker is no single token of its tokenizer.
        """
        asked = open_asked_model(str(self.model), device=torch.device("cpu"), dtype="float32")
        markers = asked.thought_format.markers
        if len(markers.open) > 1 or len(markers.close) > 1:
            raise ConfigError(
                f"{self.model}: the markers of a thought are the tokens {list(markers.open)} and"
                f" {list(markers.close)}; lm_eval can be told to leave out single ones only. Write:"
                f" rlp add-markers {self.model} --out FOLDER"
            )
        return asked

    @cached_property
    def open_marker(self) -> int:
        return self.asked.thought_format.markers.excluded


# Readings: one mapping per problem, with its prompt, answer and score


def ask_rlp(setting: Setting, mode: str) -> list[dict]:
    """By the function of `rlp eval`."""
    from lm_eval.tasks import TaskManager

    benchmark = Benchmark(
        task=setting.task["task"],
        thought_tokens=setting.thought_tokens,
        thought_temperature=setting.thought_temperature,
    )
    tasks = list(TaskManager(include_defaults=False).load([setting.task])["tasks"].values())
    ((_, rows),) = run_benchmarks(
        {benchmark.task: benchmark},
        {benchmark.task: tasks},
        setting.asked,
        modes=(mode,),
        limit=setting.limit,
        seed=0,
        rows=16,
    )
    return rows


def ask_plain(setting: Setting, task: dict, suppressed: list[int]) -> list[dict]:
    """By the command line of lm_eval, in a process of its own.

    Raises:
        ConfigError: it did not end well.
    """
    with scratch_folder() as scratch:
        task_file = scratch / f"{task['task']}.yaml"
        write_new(task_file, json_bytes(task, task_file.name), point="eval.torn_json")
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
        command += ["--model_args", f"pretrained={setting.model.resolve()},dtype=float32"]
        command += ["--tasks", str(task_file), "--limit", str(setting.limit), "--batch_size", "8"]
        command += ["--output_path", str(scratch / "out"), "--log_samples"]
        if suppressed:
            command += ["--gen_kwargs", f"suppress_tokens={suppressed}"]
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        ended = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
        if ended.returncode:
            said = (ended.stderr.strip() or "nothing").splitlines()[-1]
            raise ConfigError(f"lm_eval ended with code {ended.returncode}: {said}")

        (samples,) = (scratch / "out").rglob("samples_*.jsonl")
        found = [json.loads(line) for line in samples.read_text().splitlines()]
    return [
        {
            "question": sample["doc_id"],
            "prompt": sample["arguments"]["gen_args_0"]["arg_0"],
            "answer": sample["resps"][0][0],
            "score": float(sample["exact_match"]),
        }
        for sample in sorted(found, key=lambda sample: sample["doc_id"])
    ]


def ask_after_thoughts(setting: Setting, thoughts: list[dict]) -> list[dict]:
    """lm_eval, its prompts ending in the thoughts of a reading.

    Args:
        thoughts: rows of `think`.
    """
    thought = setting.asked.thought
    with scratch_folder() as scratch:
        lines = [
            {
                "prompt": f"{row['prompt']}{thought.open_marker}{row['thought']}"
                f"{thought.close_marker}",
                "answer": row["reference"],
            }
            for row in thoughts
        ]
        prompts = scratch / "prompts.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_new(prompts, text.encode(), point="eval.torn_rows")
        task = setting.task | {
            "task": "gsm8k_after_thoughts",
            "dataset_kwargs": {"data_files": {"test": str(prompts)}},
            "doc_to_text": "{{prompt}}",
            "num_fewshot": 0,
        }
        del task["fewshot_split"]
        return ask_plain(setting, task, [setting.open_marker])


def spelled_otherwise(setting: Setting, row: dict) -> bool:
    """Whether the text of a thought is written in other tokens than those that were sampled, seen
    from their number."""
    thought = setting.asked.thought
    text = f"{thought.open_marker}{row['thought']}{thought.close_marker}"
    sampled = 1 + row["thought_tokens"] + row["thought_truncated"]
    return len(setting.asked.tokenizer.encode(text, add_special_tokens=False)) != sampled


MAKERS: dict[str, Callable[[Setting, dict[str, list[dict]]], list[dict]]] = {
    "no_think": lambda setting, before: ask_rlp(setting, "no_think"),
    "plain": lambda setting, before: ask_plain(setting, setting.task, [setting.open_marker]),
    "think": lambda setting, before: ask_rlp(setting, "think"),
    "after_thoughts": lambda setting, before: ask_after_thoughts(setting, before["think"]),
    "unguided": lambda setting, before: ask_plain(setting, setting.task, []),
}
"""How each reading is made, after those before it."""


# Stages


def run(setting: Setting, name: str, wanted: list[str]) -> None:
    """Make the readings that are missing, and a line of each that has none.

    Raises:
        ConfigError: the folder holds readings of another setting, or something is not there.
        DataError: there is no GSM8K.
    """
    refuse_what_is_missing(setting)
    settle(setting)
    readings: dict[str, list[dict]] = {}
    for reading in MAKERS:
        path = setting.folder / f"{reading}.json"
        if reading in wanted and not path.exists():
            print(f"{name} {reading}: {setting.limit} problems", flush=True)
            began = sum(os.times()[:4])  # of this process and those that it waited for
            rows = MAKERS[reading](setting, readings)
            content = {"cpu_seconds": sum(os.times()[:4]) - began, "rows": rows}
            content |= {"date": time.strftime("%Y-%m-%d"), "cpu": environment([])["cpu"]}
            write_new(path, json_bytes(content, path.name), point="eval.torn_json")
        if not path.exists():
            continue

        content = json.loads(path.read_bytes())
        readings[reading] = content["rows"]
        if not read_results(RESULTS, LAYOUT).has(arm=name, seed=0, stage=reading):
            line = line_of(setting, name, reading, readings, content)
            add_result(RESULTS, LAYOUT, line)
            print(told(line), flush=True)


def refuse_what_is_missing(setting: Setting) -> None:
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed. Write: make smollm2")
    for split in ("train", "test"):
        if not (path := setting.data / f"{split}.jsonl").is_file():
            raise DataError(
                f"--data: there is no {path}. Write the folder of GSM8K's train.jsonl and"
                " test.jsonl (github.com/openai/grade-school-math, MIT)."
            )


def settle(setting: Setting) -> None:
    """Write the setting of the first reading, and refuse another one's.

    Raises:
        ConfigError: it is another one.
    """
    with (setting.model / "config.json").open("rb") as config:
        shape = json.load(config)
    weights = sorted(path.stat().st_size for path in setting.model.glob("*.safetensors"))
    mine = {
        "model": str(setting.model.resolve()),
        "layers": shape.get("num_hidden_layers"),
        "bytes_of_weights": weights,
        "task": setting.task | {"dataset_kwargs": None},
        "limit": setting.limit,
        "thought_tokens": setting.thought_tokens,
        "thought_temperature": setting.thought_temperature,
    }
    path = setting.folder / "setting.json"
    if not path.exists():
        make_folder(setting.folder, exist_ok=True)
        write_new(path, json_bytes(mine, path.name), point="eval.torn_json")
        return
    theirs = json.loads(path.read_bytes())
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"{setting.folder} holds readings with {key} {theirs.get(key)}; this is {value}."
                " Nothing in it was changed. Write another --name."
            )


def line_of(
    setting: Setting, name: str, reading: str, readings: dict[str, list[dict]], content: dict
) -> dict:
    """The line of a reading in benchmark.jsonl."""
    rows = readings[reading]
    accuracy, error = mean_and_error(np.array([[row["score"]] for row in rows]))
    thoughts = [row["thought_tokens"] for row in rows if row.get("thought_tokens")]
    line = {"arm": name, "seed": 0, "stage": reading, "problems": len(rows)}
    line |= {"accuracy": accuracy, "standard_error": error}
    line["thought_tokens"] = float(np.mean(thoughts)) if thoughts else None
    line |= dict.fromkeys(("same_prompts", "same_answers", "spelled_otherwise"))
    if partner := readings.get(PARTNER.get(reading, "")):
        pairs = list(zip(rows, partner, strict=True))
        line["same_prompts"] = sum(own["prompt"].startswith(row["prompt"]) for own, row in pairs)
        line["same_answers"] = sum(own["answer"] == row["answer"] for own, row in pairs)
        if reading == "after_thoughts":
            line["spelled_otherwise"] = sum(spelled_otherwise(setting, row) for row in partner)
    line |= {key: content[key] for key in ("cpu_seconds", "cpu", "date")}
    return line | {key: versions()[key] for key in ("lm_eval", "transformers", "torch")}


# Telling

TITLES = {
    "no_think": "`rlp eval`, no thought",
    "plain": "lm_eval, open marker left out",
    "think": "`rlp eval`, a thought",
    "after_thoughts": "lm_eval after those thoughts",
    "unguided": "lm_eval as it is",
}


def told(line: dict) -> list[str]:
    """A row of the table."""
    same = "" if line["same_answers"] is None else f"{line['same_answers']} of {line['problems']}"
    if line["spelled_otherwise"]:
        same += f" ({line['spelled_otherwise']} spelled otherwise)"
    right = round(line["accuracy"] * line["problems"])
    thought = "" if line["thought_tokens"] is None else f"{line['thought_tokens']:.1f}"
    cells = [line["arm"], TITLES[line["stage"]], f"{right} of {line['problems']}", thought, same]
    return [*cells, f"{line['cpu_seconds']:.0f}"]


def table() -> str:
    """All of benchmark.jsonl."""
    titles = ["model", "read by", "right", "tokens of a thought", "the same answer", "CPU-seconds"]
    return markdown_table(titles, [told(line) for line in read_results(RESULTS, LAYOUT).lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="a model folder")
    parser.add_argument("--name", help="of the model in the results")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of GSM8K's two files")
    parser.add_argument("--limit", type=int, default=32, help="problems (32)")
    parser.add_argument("--thought-tokens", type=int, metavar="L", help="at most (as trained)")
    parser.add_argument("--thought-temperature", type=float, metavar="T", help="(as trained)")
    parser.add_argument(
        "--readings", nargs="+", choices=MAKERS, default=list(MAKERS), help="which (all)"
    )
    parser.add_argument("--table", action="store_true", help="write the table of benchmark.md")
    options = parser.parse_args()
    if options.model and not (options.name and options.data):
        parser.error("MODEL needs --name and --data")
    if not options.model and not options.table:
        parser.error("nothing to do: name a MODEL, or write --table")
    try:
        if options.model:
            setting = Setting(
                model=options.model,
                data=options.data,
                folder=READINGS / options.name,
                limit=options.limit,
                thought_tokens=options.thought_tokens,
                thought_temperature=options.thought_temperature,
            )
            run(setting, options.name, options.readings)
        if options.table:
            PAGE.write_text(fill_page(PAGE.read_text(), {"table": table()}))
    except (ConfigError, DataError, DamagedFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_DATA if isinstance(error, DataError) else BAD_CONFIG
    return DONE


if __name__ == "__main__":
    sys.exit(main())

"""The stage that makes documents: from the model it is given, real ones, or both."""

import json
from pathlib import Path

import pytest

from rlp.config import ConfigError
from rlp.post.diversity_drawing import Drawing, draw_answers
from rlp.post.diversity_samples import read_prompts
from rlp.post.pipeline_checks import refuse_bad
from rlp.post.pipeline_config import GenerateStage, load_pipeline
from rlp.post.pipeline_folder import checksum_of_file
from rlp.post.pipeline_plan import Costs
from rlp.post.pipeline_task import asked_of
from rlp.post.pipeline_tasks import Task, every_task
from rlp.post.stages.generation import generate
from rlp.post.stages.interface import StageError, Work
from rlp.process.faults import VARIABLE, InjectedFault
from rlp.process.outside import PartError
from rlp.process.ranks import start_ranks

PROMPTS = [{"prompt": "w1 w2", "kind": "open"}, {"prompt": "w3", "kind": "closed"}]


def only_w3(texts: list[str]) -> list[str]:
    """A filter: what is kept begins with w3."""
    return ["" if text.startswith("w3") else "not w3" for text in texts]


def none_of_them(texts: list[str]) -> list[str]:
    return ["bad"] * len(texts)


def too_few(texts: list[str]) -> list[str]:
    return [""]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    rows = {"prompts": PROMPTS, "real": [{"text": f"w{n} w{n}"} for n in range(5, 15)]}
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows}


def work(folder: Path, model: Path, files: dict[str, str], **more: object) -> Work:
    settings = {"kind": "generate", "documents": 4, "tokens": 5, "separator": " "} | more
    if settings.get("real_share", 0) < 1:
        settings["prompts"] = files["prompts"]
    if settings.get("real_share", 0) > 0:
        settings["data"] = [files["real"]]
    folder.mkdir(exist_ok=True)
    return Work(
        GenerateStage(**settings), 3, str(model), folder, start_ranks(), tell=lambda _: None
    )


def texts(folder: Path, name: str = "documents", key: str = "text") -> list[str]:
    return [json.loads(line)[key] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_documents_are_what_the_model_writes_behind_the_prompts(tmp_path, files, model_folder):
    made = generate(work(tmp_path / "own", model_folder, files))
    samples = tmp_path / "again.jsonl"
    drawing = Drawing(2, 2, 1.0, 1.0, frame="{prompt}", tokens=5, seed=3)
    panel = read_prompts(Path(files["prompts"]))
    draw_answers(str(model_folder), panel, drawing, samples, name="model", tell=lambda _: None)
    lines = map(json.loads, samples.read_text().splitlines())
    by_number = sorted((line["sample"], line["prompt"], line["text"]) for line in lines)
    assert texts(tmp_path / "own") == [f"{prompt} {text}" for _, prompt, text in by_number]
    # A stage that makes data hands on the model that it was given.
    assert made.kept == () and made.spent.optimizer_steps == 0
    assert made.spent.generated_tokens == sum(texts(tmp_path / "own", "samples", "tokens_drawn"))
    assert made.spent.flops > 0


def test_an_arm_takes_the_first_real_documents_and_the_rest_of_the_model(
    tmp_path, files, model_folder
):
    generate(work(tmp_path / "own", model_folder, files))
    generate(work(tmp_path / "mixed", model_folder, files, real_share=0.5))
    real = generate(work(tmp_path / "real", model_folder, files, real_share=1.0))
    own, mixed = texts(tmp_path / "own"), texts(tmp_path / "mixed")
    assert mixed == [*own[:2], "w5 w5", "w6 w6"]
    assert texts(tmp_path / "real") == [f"w{n} w{n}" for n in (5, 6, 7, 8)]
    assert real.spent.generated_tokens == 0 and real.spent.flops == 0


def test_an_interrupted_stage_ends_with_the_same_documents(tmp_path, files, model_folder):
    asked = work(tmp_path / "own", model_folder, files)
    whole = generate(asked)
    before = {name: texts(tmp_path / "own", name) for name in ("documents", "samples")}
    (tmp_path / "own" / "documents.jsonl").unlink()
    samples = tmp_path / "own" / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-40])
    again = generate(asked)
    assert {name: sorted(texts(tmp_path / "own", name)) for name in before} == {
        name: sorted(lines) for name, lines in before.items()
    }
    assert texts(tmp_path / "own") == before["documents"]
    assert again.spent.flops == whole.spent.flops


def test_a_stage_that_dies_while_it_writes_leaves_no_half_of_its_documents(
    tmp_path, files, model_folder, monkeypatch
):
    generate(work(tmp_path / "whole", model_folder, files))
    asked = work(tmp_path / "own", model_folder, files)
    monkeypatch.setenv(VARIABLE, "generate.torn_documents:1:raise")
    with pytest.raises(InjectedFault):
        generate(asked)
    assert not (tmp_path / "own" / "documents.jsonl").exists()
    monkeypatch.delenv(VARIABLE)
    generate(asked)
    assert texts(tmp_path / "own") == texts(tmp_path / "whole")


def test_a_filter_chooses_among_more_and_says_why(tmp_path, files, model_folder):
    name = f"{__name__}:only_w3"
    asked = work(tmp_path / "kept", model_folder, files, draws=2, filter=name)
    generate(asked)
    # Four are drawn with each of two prompts, and each prompt has two of the four documents.
    assert len(texts(tmp_path / "kept", "samples")) == 8
    kept = texts(tmp_path / "kept")
    assert len(kept) == 2 and all(text.startswith("w3") for text in kept)
    assert len(texts(tmp_path / "kept", "dropped")) == 4
    assert set(texts(tmp_path / "kept", "dropped", "reason")) == {"not w3"}


def test_a_filter_that_leaves_nothing_or_says_too_little_is_refused(tmp_path, files, model_folder):
    asked = work(tmp_path / "none", model_folder, files, filter=f"{__name__}:none_of_them")
    with pytest.raises(StageError, match="has left none of 4 documents"):
        generate(asked)
    asked = work(tmp_path / "few", model_folder, files, filter=f"{__name__}:too_few")
    with pytest.raises(PartError, match="gave 1; expected a list of 4 texts"):
        generate(asked)


def test_fewer_real_documents_than_asked_for_are_refused(tmp_path, files, model_folder):
    asked = work(tmp_path / "real", model_folder, files, real_share=1.0, documents=11)
    with pytest.raises(ConfigError, match="10 rows, and real_share 1 of 11 documents takes 11"):
        generate(asked)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"documents": 0}, "documents must be at least 1"),
        ({"documents": 4, "real_share": 1.5}, "real_share is a fraction"),
        ({"documents": 4}, "prompts must be there with real_share 0"),
        ({"documents": 4, "real_share": 0.5, "prompts": "p"}, "data must be there"),
        ({"documents": 4, "real_share": 1.0, "data": ["d"], "prompts": "p"}, "left out"),
        ({"documents": 4, "prompts": "p", "draws": 3}, "draws above 1 is for a filter"),
        ({"documents": 4, "prompts": "p", "filter": "none"}, "a package.module:function"),
        ({"documents": 4, "prompts": "p", "keep_steps": [1]}, "it makes no model"),
    ],
)
def test_settings_that_can_not_be_meant_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        GenerateStage(kind="generate", **given)


LOOP = """
dir: {dir}/out
seeds: [0]
model: {model}
stages:
  made: {{kind: generate, documents: 4, prompts: {prompts}}}
  cpt: {{kind: cpt, config: {config}, overrides: ['data.train=["{{made}}/work/documents.jsonl"]']}}
arms: {{own: [made, cpt]}}
"""


def test_a_round_can_be_planned_before_its_documents_are_there(tmp_path, files, model_folder):
    config = tmp_path / "round.yaml"
    config.write_text(
        "run: {dir: unused}\nmodel: {path: unused}\ndata: {train: [unused.jsonl]}\n"
        "budget: {steps: 7}\n"
    )
    path = tmp_path / "pipeline.yaml"
    text = LOOP.format(dir=tmp_path, model=model_folder, prompts=files["prompts"], config=config)
    path.write_text(text)
    pipeline = load_pipeline(path)
    tasks = every_task(pipeline)
    assert refuse_bad(pipeline) == tasks
    assert Costs(tasks, pipeline, start_ranks()).of(Task(0, ("made", "cpt"))).steps == 7

    inputs = asked_of(Task(0, ("made",)), pipeline)["inputs"]
    assert inputs[f"data {files['prompts']}: prompts.jsonl"] == checksum_of_file(
        Path(files["prompts"])
    )

    path.write_text(text.replace(files["prompts"], "absent.jsonl"))
    with pytest.raises(ConfigError, match="absent.jsonl: no such file"):
        refuse_bad(load_pipeline(path))

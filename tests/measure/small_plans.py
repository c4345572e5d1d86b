"""A plan of a run that can be added up by hand."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from rlp.config import Config, load_config
from rlp.measure.plan import Plan, plan_run
from rlp.measure.plan_work import FormatTokens, step_flops
from rlp.model.shapes import ModelShapes

SHAPES = ModelShapes(
    parameters=1000,
    matmul_parameters=100,
    scan_multiply_adds=0,
    attention_layers=2,
    query_key_width=8,
    value_width=8,
    key_value_elements=32,
    state_elements=50,
    layers=2,
    activation_elements=300,
    layer_activation_elements=140,
    width=5,
    vocabulary=7,
    tied=False,
)
EIGHTY_GB = 80 * 10**9
CPU = torch.device("cpu")


def small_run(tmp_path: Path, *overrides: str) -> Config:
    """B 4, P 10, G 3, L 6, H 1, one position per document, no LM loss, on a GPU in bfloat16 unless
    overridden."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: "
        + str(tmp_path / "absent" / "run")
        + "}\nmodel: {path: nowhere}\ndata: {train: [x.jsonl]}\n"
    )
    given = [
        "data.max_document_tokens=10",
        "optim.batch_size=4",
        "thought.group_size=3",
        "thought.max_thought_tokens=6",
        "objective.lm_weight=0",
        "budget.steps=7",
    ]
    return load_config(path, [*given, *overrides])


def plan_of(
    config: Config,
    world_size: int = 2,
    device_bytes: int | None = EIGHTY_GB,
    *,
    layout: str = "repeated",
    shapes: ModelShapes = SHAPES,
    **options: FormatTokens,
) -> Plan:
    return plan_run(config, shapes, world_size, device_bytes, layout=layout, **options)


def parts(config: Config, layout: str = "repeated", **options: object) -> dict[str, int]:
    return {part.name: part.num_bytes for part in plan_of(config, layout=layout, **options).memory}


def flops_of(config: Config, layout: str = "repeated", **options: FormatTokens) -> dict[str, float]:
    return step_flops(config, SHAPES, 2, layout=layout, **options)


def published(name: str) -> PretrainedConfig:
    """The config of a model of full size."""
    return AutoConfig.for_model(
        **json.loads((Path(__file__).parent / "shapes" / f"{name}.json").read_text())
    )

"""Hand a checkpoint on: a plain Hugging Face folder that SFT and RL trainers, evaluators and `rlp`
itself load.

Beside weights (safetensors), config and tokenizer it holds `thought_format.json`, how a thought is
written and sampled, and a model card with the numbers of the run.
"""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlp.config import (
    BudgetConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ThoughtConfig,
    load_config,
)
from rlp.learn.checkpoint import Checkpoint
from rlp.learn.engine import Engine
from rlp.model.loading import load_policy, load_with_markers
from rlp.model.setup import ModelSetup
from rlp.model.thoughts import ThoughtFormat
from rlp.process.console import visible_text
from rlp.process.faults import fault
from rlp.process.files import NotWrittenError, new_folder, refuse_existing, write_new
from rlp.process.ranks import Ranks
from rlp.process.schemas import THOUGHT_FORMAT, Fields


def export_model(
    folder: Path,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
    config: Config,
    thought_format: ThoughtFormat,
    card: str,
) -> None:
    """Write the policy as a Hugging Face folder: safetensors, tokenizer, model card, and the
    thought format.

    The weights are the float32 masters, whatever the compute dtype: those that the next trainer
    would round for itself, and the same as `export_checkpoint` writes. A collective: every rank
    takes part in putting them together, the first one writes.
    """
    fault("export.before_write")
    tensors = {}
    for name, value in engine.shards.whole(engine.shards.master):
        if ranks.is_first:
            tensors[name] = value.cpu()

    failure = None
    if ranks.is_first:
        try:
            _write(folder, engine.policy.lm, tensors, tokenizer, config, thought_format, card)
        except (OSError, SafetensorError) as error:
            failure = str(error)
    failure = ranks.broadcast(failure)
    if failure:
        raise NotWrittenError(
            f"{folder}: the export could not be written: {failure}. Make room there, and end the"
            " run with run.resume=auto."
        )


def export_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder, in float32 as its master weights
    are.

    Raises:
        ConfigError: the folder exists, or the model and tokenizer that the run started from are
            gone.
    """
    refuse_existing(folder)
    config = load_config(checkpoint.config)
    setup = ModelSetup(config)
    policy = load_policy(config, setup.tokenizer, setup.markers, torch.float32, torch.device("cpu"))
    tensors = master_weights(checkpoint, policy.lm)
    card = model_card(config, None, None, checkpoint.step, policy.stock_time_step_limit)
    _write(folder, policy.lm, tensors, setup.tokenizer, config, setup.thought_format, card)


def export_with_markers(model: str, thought: ThoughtConfig, folder: Path) -> list[str]:
    """Write a model as a Hugging Face folder whose tokenizer has the markers of `thought` as single
    tokens, as `thought.add_markers` adds them to the model of a run. Weights keep their dtype.

    Returns:
        `marker_notes`.

    Raises:
        ConfigError: the folder exists, there is no such model, or its tokenizer has the markers
        already.
    """
    refuse_existing(folder)
    config = Config(
        model=ModelConfig(path=model),
        thought=thought,
        data=DataConfig(train=["unused"]),
        budget=BudgetConfig(steps=1),
    )
    setup = ModelSetup(config)
    if not setup.markers.pieces:
        raise ConfigError(
            f"{model} has {thought.open_marker!r} ({setup.markers.open[0]}) and"
            f" {thought.close_marker!r} ({setup.markers.close[0]}) as single tokens already. Use it"
            " as it is."
        )

    lm = load_with_markers(config, setup.tokenizer, setup.markers)
    try:
        with new_folder(folder, point="markers.before_rename") as new:
            lm.save_pretrained(new, safe_serialization=True)
            setup.tokenizer.save_pretrained(new)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out: {folder} can not be written: {error}.") from error
    return setup.marker_notes()


def master_weights(checkpoint: Checkpoint, lm: nn.Module) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint by the names of a model, tied ones once.

    Raises:
        CheckpointError: it was made by a model with other parameters.
    """
    return {
        name: checkpoint.read("master", name, 0, p.numel()).reshape(p.shape)
        for name, p in lm.named_parameters()
    }


def _write(
    folder: Path,
    lm: PreTrainedModel,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    thought_format: ThoughtFormat,
    card: str,
) -> None:
    manifest = {
        "open_marker": config.thought.open_marker,
        "open_marker_ids": list(thought_format.markers.open),
        "close_marker": config.thought.close_marker,
        "close_marker_ids": list(thought_format.markers.close),
        "excluded_from_targets": thought_format.markers.excluded,
        "instruction_ids": list(thought_format.instruction),
        "temperature": thought_format.temperature,
        "target_temperature": thought_format.target_temperature,
        "max_thought_tokens": config.thought.max_thought_tokens,
        "horizon": thought_format.horizon,
        "order": ["instruction", "prefix", "open_marker", "thought", "close_marker", "target"],
    }
    with new_folder(folder, point="export.before_rename") as new:
        lm.save_pretrained(new, state_dict=tensors, safe_serialization=True)
        # transformers wrote the dtype that the model computes in.
        _config_in_float32(lm).save_pretrained(new)
        fault("export.torn_weights")
        tokenizer.save_pretrained(new)
        content = json.dumps(manifest, indent=2).encode()
        write_new(new / "thought_format.json", content, point="export.torn_format")
        write_new(new / "README.md", card.encode(), point="export.torn_card")
    fault("export.after_rename")


def _config_in_float32(lm: PreTrainedModel) -> PretrainedConfig:
    """The model's config, with the dtype of the weights that an export holds."""
    config = copy.deepcopy(lm.config)
    for part in (config, config.get_text_config()):
        part.dtype = "float32"
    return config


def read_thought_format(path: Path) -> dict:
    """`thought_format.json` of a folder that may be a stranger's, what is used of it; empty where
    there is no such file.

    Raises:
        ConfigError: it is no JSON object, or holds other things than `_write` writes.
    """
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON: {error}. Export the checkpoint again with `rlp export`."
        ) from error
    if said := Fields({}, THOUGHT_FORMAT).problem(manifest, ""):
        raise ConfigError(
            f"{path} is no thought format: {said}. Export the checkpoint again with `rlp export`."
        )
    return {key: manifest[key] for key in THOUGHT_FORMAT if key in manifest}


def known_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The `instruction_ids` of a thought format, which the tokenizer must have."""
    last = max(tokenizer.get_vocab().values())
    if max(ids, default=0) > last:
        raise ConfigError(
            f"thought_format.json: instruction_ids holds {max(ids)}, and the tokenizer of the"
            f" folder ends at {last}. Write a folder with the tokenizer that the run used."
        )
    return tuple(ids)


def as_code(text: str) -> str:
    """Text as Markdown code, in which nothing means anything: its control characters are spelled
    out, its backquotes are fenced in by more of them."""
    shown = visible_text(text).replace("\n", "\\n").replace("\t", "\\t")
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    if shown.startswith(("`", " ")) or shown.endswith(("`", " ")):
        shown = f" {shown} "
    return f"{fence}{shown}{fence}"


def model_card(
    config: Config,
    before: dict | None,
    after: dict | None,
    steps: int,
    stock_time_step_limit: tuple[float, float] | None,
) -> str:
    """README.md of an export: where it comes from, what it gained, how to think with it. What a
    config says enters as code, and no Markdown.

    Args:
        stock_time_step_limit: of the policy.
    """
    objective = "continued pretraining (next-token loss)"
    if config.objective.thinks:
        objective = "RLP (reinforcement as a pretraining objective, arXiv 2510.01265)"
    paragraphs = [
        "---\nlibrary_name: transformers\ntags: [rlp]\n---",
        f"# {as_code(Path(config.run.dir).name)}",
        f"{as_code(config.model.path)} after {steps} steps of {objective}. The settings are in the"
        " run's `config.yaml`.",
    ]
    if before and after:
        paragraphs.append(f"Held-out panel of {after['panel_positions']} positions:")
        paragraphs.append(_table(before, after))

    thought = config.thought
    paragraphs.append(
        f"A thought stands after the prefix, between {as_code(thought.open_marker)} and"
        f" {as_code(thought.close_marker)}, and is sampled at temperature {thought.temperature:g},"
        f" at most {thought.max_thought_tokens} tokens, the close marker included;"
        " `thought_format.json` has the token ids. Predictions leave out the open marker's first"
        " token."
    )
    if stock_time_step_limit:
        low, high = stock_time_step_limit
        paragraphs.append(
            "transformers clamps the time steps of this architecture's scans (prefill and scoring)"
            f" to {low:g} .. {high:g} and does not clamp them in decoding; it was trained with the"
            " limits of its `config.json` in both. Log-probabilities that transformers scores"
            " differ from the run's by that: set `time_step_limit` of the mixers to the config's to"
            " have them equal."
        )
    return "\n\n".join(paragraphs) + "\n"


def _table(before: dict, after: dict) -> str:
    """What the panel says before and after, without its intervals."""
    lines = ["| | before | after |", "|---|---|---|"]
    for name, value in after.items():
        is_end = name.endswith(("_low", "_high"))
        if name in before and not name.startswith("panel_") and not is_end:
            lines.append(f"| {name} | {before[name]:.4g} | {value:.4g} |")
    return "\n".join(lines)

"""Hand a checkpoint on: a plain Hugging Face folder that SFT and RL trainers, evaluators and `rlp` itself load.

Beside weights (safetensors), config and tokenizer it holds `thought_format.json`, how a thought is written
and sampled, and a model card with the numbers of the run.
"""

import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlp.checkpoint import Checkpoint, CheckpointError
from rlp.config import Config, ConfigError, config_from_dict
from rlp.distributed import Ranks
from rlp.engine import Engine
from rlp.inputs import ModelInputs
from rlp.layout import ThoughtFormat
from rlp.model import load_policy


def export_model(folder: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, config: Config, form: ThoughtFormat, card: str) -> None:
    """Write the policy as a Hugging Face folder: safetensors, tokenizer, model card, and the thought format.

    A collective: every rank takes part in gathering, the first one writes.
    """
    tensors = {}
    for name, parameter in engine.parameters():
        with engine.gathered([parameter]):
            if ranks.is_first:
                tensors[name] = parameter.detach().cpu().clone()
    failure = None
    if ranks.is_first:
        try:
            _write(folder, engine.policy.lm, tensors, tokenizer, config, form, card)
        except (OSError, SafetensorError) as error:
            failure = str(error)
    failure = ranks.broadcast(failure)
    if failure:
        raise CheckpointError(f"{folder}: the export could not be written: {failure}.")


def export_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder, in float32 as its master weights are.

    Raises:
        ConfigError: the folder exists, or the model and tokenizer that the run started from are gone.
    """
    if folder.exists():
        raise ConfigError(f"--out: {folder} exists and is never written over. Write another folder.")
    config = config_from_dict(checkpoint.state["config"])
    inputs = ModelInputs(config)
    policy = load_policy(config, inputs.tokenizer, torch.float32, torch.device("cpu"))
    tensors = {name: checkpoint.read("master", name, 0, p.numel()).reshape(p.shape) for name, p in policy.lm.named_parameters()}
    _write(folder, policy.lm, tensors, inputs.tokenizer, config, inputs.form, model_card(config, None, None, checkpoint.step))


def _write(folder: Path, lm: PreTrainedModel, tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, config: Config, form: ThoughtFormat, card: str) -> None:
    temporary = folder.with_name(f".tmp.{folder.name}.{secrets.token_hex(4)}")
    lm.save_pretrained(temporary, state_dict=tensors, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    manifest = {
        "open_marker": config.thought.open_marker, "open_marker_ids": list(form.markers.open),
        "close_marker": config.thought.close_marker, "close_marker_ids": list(form.markers.close),
        "excluded_from_targets": form.markers.excluded, "instruction_ids": list(form.instruction),
        "temperature": form.temperature, "target_temperature": form.target_temperature,
        "max_thought_tokens": config.thought.max_thought_tokens, "horizon": form.horizon,
        "order": ["instruction", "prefix", "open_marker", "thought", "close_marker", "target"],
    }
    (temporary / "thought_format.json").write_text(json.dumps(manifest, indent=2))
    (temporary / "README.md").write_text(card)
    os.replace(temporary, folder)


def model_card(config: Config, before: dict | None, after: dict | None, steps: int) -> str:
    """README.md of an export: where it comes from, what it gained, how to think with it."""
    objective = "RLP (reinforcement as a pretraining objective, arXiv 2510.01265)" if config.objective.thinks else "continued pretraining (next-token loss)"
    lines = ["---", "library_name: transformers", "tags: [rlp]", "---", "", f"# {Path(config.run.dir).name}", "",
             f"`{config.model.path}` after {steps} steps of {objective}. The settings are in the run's `config.yaml`.", ""]
    if before and after:
        lines += [f"Held-out panel of {after['panel_positions']} positions:", "", "| | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {before[name]:.4g} | {after[name]:.4g} |" for name in after if name != "panel_positions" and name in before]
        lines.append("")
    lines += [f"A thought stands after the prefix, between `{config.thought.open_marker}` and `{config.thought.close_marker}`, and is sampled at "
              f"temperature {config.thought.temperature:g}, at most {config.thought.max_thought_tokens} tokens, the close marker included; "
              "`thought_format.json` has the token ids. Predictions leave out the open marker's first token.", ""]
    return "\n".join(lines)

"""What is handed on: a plain Hugging Face folder that other trainers take."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlp.learn.export import model_card
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from tests.tiny_models import tiny_policy
from tests.training import tiny_config


@pytest.mark.parametrize(
    "settings",
    [
        {"engine__zero_stage": 0},
        *({"engine__zero_stage": stage, "engine__dtype": "bfloat16"} for stage in (1, 2, 3)),
    ],
)
def test_the_export_is_the_trained_policy(trained, settings):
    """It loads with transformers alone, tied weights tied, equal to the checkpoint's float32 master
    weights."""
    folder = trained(**settings)
    assert json.loads((folder / "export" / "config.json").read_text())["dtype"] == "float32"
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder / "export", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    master = load_file(folder / "checkpoints" / "step_3" / "shard_00000-00000.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.detach(), master[f"master/{name}"].reshape(parameter.shape)), (
            name
        )
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_export_says_how_to_think(trained):
    """Manifest and card: markers with their ids, temperature, budget; the tokenizer comes along."""
    folder = trained() / "export"
    manifest = json.loads((folder / "thought_format.json").read_text())
    assert manifest["open_marker_ids"] == [2] and manifest["close_marker_ids"] == [3]
    assert (
        manifest["temperature"],
        manifest["max_thought_tokens"],
        manifest["excluded_from_targets"],
    ) == (0.7, 5, 2)
    assert AutoTokenizer.from_pretrained(folder).encode("<think>", add_special_tokens=False) == [2]
    assert "<think>" in (folder / "README.md").read_text()


def test_the_card_of_a_hybrid_says_what_transformers_scores_otherwise(tmp_path):
    """Only where the scan was mended: with transformers' own clamp, the log-probabilities are other
    ones."""
    lm = tiny_policy("nemotron_h").lm
    mixers = [module for module in lm.modules() if hasattr(module, "time_step_limit")]
    for mixer in mixers:
        mixer.time_step_limit = (0.5, float("inf"))
    tokens = torch.arange(5, 25)[None]
    stock = lm(input_ids=tokens).logits
    policy = Policy(lm, Markers(open=(2,), close=(3,)))
    config = tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "corpus")
    assert not torch.allclose(stock, policy.lm(input_ids=tokens).logits, atol=1e-3)
    assert (
        "clamps the time steps of this architecture's scans (prefill and scoring) to 0.5 .. inf"
        in model_card(config, None, None, 3, policy.stock_time_step_limit)
    )
    again = Policy(policy.lm, policy.markers)
    assert again.stock_time_step_limit is None and tiny_policy().stock_time_step_limit is None
    assert "clamps" not in model_card(config, None, None, 3, None)


def test_the_export_trains_on_in_trl(trained, tmp_path):
    """One step of supervised fine-tuning, then one of GRPO, from the exported folder alone."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (the extra `post`)")
    from datasets import Dataset

    folder = tmp_path / "export"
    shutil.copytree(trained() / "export", folder)
    texts = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10 w11 w12"] * 2
    common = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    sft = trl.SFTTrainer(
        model=str(folder),
        args=trl.SFTConfig(output_dir=str(tmp_path / "sft"), max_length=16, **common),
        train_dataset=Dataset.from_dict({"text": texts}),
    )
    assert sft.train().training_loss > 0
    grpo = trl.GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "grpo"), max_completion_length=4, num_generations=2, **common
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )
    assert grpo.train().global_step == 1

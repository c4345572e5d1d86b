"""What a reader has who cloned the repository, with small data and tiny settings."""

import json
import shutil
import subprocess
from pathlib import Path

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from tests.docs.pages import REPOSITORY

LIMIT_S = 300.0
"""The blocks of a page take seconds; ones that have not ended after this hang."""

QUICK = {
    "optim": {"batch_size": 4, "micro_batch_size": 4},
    "budget": {"steps": 16, "tokens": None},
    "evaluation": {"panel_positions": 32, "thoughts_per_position": 2},
    "checkpoint": {"every_n_steps": 8},
}
"""A second in place of minutes: what the configs of the scratch folder say otherwise. Sixteen steps
are enough for an arm that spends the same to 1 %."""

TINY = {
    "model": {"path": "MODEL"},
    "data": {"max_document_tokens": 64},
    "thought": {"group_size": 2, "max_thought_tokens": 4, "add_markers": True},
    "optim": {"batch_size": 8, "micro_batch_size": 2},
    "budget": {"steps": 2, "tokens": None},
    "evaluation": {"panel_positions": 32, "thoughts_per_position": 2, "batch_size": 32},
    "logging": {"every_n_steps": 1},
}
"""The same where a config is about a pretrained model."""

SETTINGS = {
    "quickstart.yaml": QUICK,
    "warm_start.yaml": TINY,
    "qwen3_1p7b_mixed.yaml": TINY,
}
"""By config; the others are not run."""

PROBLEMS = [
    {
        "question": f"{a} and {b}?",
        "answer": f"{a}+{b} = <<{a}+{b}={a + b}>>{a + b} in all.\n#### {a + b}",
    }
    for a in range(8)
    for b in range(4)
]
"""Problems with their annotations, as GSM8K writes them."""


def make_clone(folder: Path, environment: dict[str, str]) -> None:
    """The repository, the world, and files of the reader's own."""
    for name in (
        "train.py",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
        "rlp",
        "kernels",
        "docs",
        "tests",
    ):
        (folder / name).symlink_to(REPOSITORY / name)
    without_data = shutil.ignore_patterns("data", "headings", "seeds", "heading_seeds", "model")
    shutil.copytree(REPOSITORY / "experiments", folder / "experiments", ignore=without_data)

    (folder / "configs").mkdir()
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        for section, values in SETTINGS.get(path.name, {}).items():
            config[section] = config.get(section, {}) | values
        (folder / "configs" / path.name).write_text(yaml.safe_dump(config, sort_keys=False))

    lines = [json.dumps(problem) for problem in PROBLEMS]
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "corpus").mkdir()
    texts = [json.dumps({"text": problem["answer"]}) for problem in PROBLEMS]
    (folder / "corpus" / "part.jsonl").write_text("\n".join(texts) + "\n")
    save_model(folder / "MODEL")

    world = "rlp world experiments/world/data"
    made = run_shell(world, folder, environment)
    assert made.returncode == 0, made.stdout


def save_model(folder: Path) -> None:
    """A random model that reads and writes bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=vocabulary["<eos>"],
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)


def run_shell(
    text: str, folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """A block of shell commands; the first that fails ends it."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )

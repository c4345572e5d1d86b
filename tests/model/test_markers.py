"""The two markers of a thought: what is refused, what is said of several tokens, and markers that
are added to a model."""

import json
import re
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PreTrainedTokenizerFast

from rlp import train as program
from rlp.cli import main
from rlp.config import ConfigError, ThoughtConfig
from rlp.data.documents import Document
from rlp.model.attention import register
from rlp.model.layout import repeated_layout, tree_layout
from rlp.model.markers import Markers, embed_markers, find_markers, marker_notes
from rlp.model.scoring import score
from rlp.model.setup import ModelSetup, PanelSetup, RunSetup
from rlp.model.thoughts import ThoughtFormat
from rlp.process.exit_codes import DONE
from rlp.trainer import Trainer
from tests import REPOSITORY
from tests.tiny_models import ARCHITECTURES, architecture, tiny_policy, word_tokenizer
from tests.training import assert_same_run, exported, read_lines, tiny_config, train

TWO_WORDS = {"open_marker": "<pad> w1", "close_marker": "<pad> w2"}
"""Markers that the tokenizer of the tests writes with two tokens each, 0 and 7, 0 and 8; no
document of the tests holds them."""
ADDED = {f"thought__{key}": f"'{text}'" for key, text in TWO_WORDS.items()} | {
    "thought__add_markers": True
}
PIECES = {48: (0, 7), 49: (0, 8)}
ODD_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one for a space with ab after it, as byte-level tokenizers have."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*letters, "ab", "\u0120ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("\u0120", "ab")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def grown(lm):
    """Tables (embedding, head, bias) before and after the markers came in."""

    def tables():
        head = lm.get_output_embeddings()
        return [
            table.detach().clone()
            for table in (
                lm.get_input_embeddings().weight,
                head.weight,
                getattr(head, "bias", None),
            )
            if table is not None
        ]

    before = tables()
    embed_markers(
        lm, Markers(open=(48,), close=(49,), pieces=PIECES), lambda parameters: nullcontext()
    )
    return before, tables()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "phi"])
def test_an_added_marker_begins_as_the_mean_of_its_pieces(name):
    """In the embedding, the head and the head's bias, of every architecture, tied or not; every
    other row stays."""
    if name == "phi":
        lm = AutoModelForCausalLM.from_config(
            PhiConfig(
                vocab_size=48,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=64,
            )
        )
        torch.nn.init.normal_(lm.lm_head.bias)
    else:
        lm = tiny_policy(name).lm
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    before, after = grown(lm)
    assert len(after) == (3 if name == "phi" else 2)
    for old, new in zip(before, after):
        assert len(new) == 50
        assert torch.equal(new[:48], old)
        for row, (first, second) in PIECES.items():
            torch.testing.assert_close(new[row], (old[first] + old[second]) / 2)
    assert lm.config.get_text_config().vocab_size == 50
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    assert lm(torch.tensor([[5, 48, 49]])).logits.shape[-1] == 50


def test_rows_beyond_the_tokenizer_are_used_first():
    """A vocabulary that was padded to 64 stays of that size, and its padding row stays what it
    is."""
    config = architecture("llama")
    config.vocab_size, config.pad_token_id = 64, 60
    lm = AutoModelForCausalLM.from_config(config)
    before, after = grown(lm)
    for old, new in zip(before, after):
        assert (
            len(new) == 64 and torch.equal(new[50:], old[50:]) and torch.equal(new[:48], old[:48])
        )
        torch.testing.assert_close(
            new[48:50], torch.stack([(old[0] + old[7]) / 2, (old[0] + old[8]) / 2])
        )
    assert lm.get_input_embeddings().padding_idx == 60


def test_markers_that_are_tokens_already_are_left_alone():
    """Nothing is added, and that is said."""
    tokenizer, config = word_tokenizer(), ThoughtConfig(add_markers=True)
    markers = find_markers(tokenizer, config)
    assert markers == Markers(open=(2,), close=(3,)) and len(tokenizer) == 48
    assert "nothing is added" in marker_notes(tokenizer, markers, config)[0]
    assert marker_notes(tokenizer, markers, ThoughtConfig()) == []


def test_an_open_marker_of_several_tokens_is_warned_of():
    """With the ordinary token that it takes from every target, and what to do; one that was added
    is told instead."""
    tokenizer, config = word_tokenizer(), ThoughtConfig(**TWO_WORDS)
    (note,) = marker_notes(tokenizer, find_markers(tokenizer, config), config)
    assert note.startswith("WARNING: thought.open_marker '<pad> w1' is 2 tokens")
    assert all(
        words in note
        for words in (
            "'<pad>' (token id 0)",
            "left out of every target softmax",
            "thought.add_markers=true",
            "rlp add-markers",
        )
    )
    config = ThoughtConfig(**TWO_WORDS, add_markers=True)
    markers = find_markers(tokenizer, config)
    assert (markers.open, markers.close, dict(markers.pieces), markers.excluded) == (
        (48,),
        (49,),
        PIECES,
        48,
    )
    (note,) = marker_notes(tokenizer, markers, config)
    assert "48 from ['<pad>', 'w1']; 49 from ['<pad>', 'w2']" in note


@pytest.mark.parametrize("add_markers", [False, True])
def test_text_with_an_added_marker_is_one_token(add_markers):
    """So one's own text with thoughts in it trains the markers that a run samples."""
    tokenizer, config = word_tokenizer(), ThoughtConfig(**TWO_WORDS, add_markers=add_markers)
    find_markers(tokenizer, config)
    ids = tokenizer.encode("w5 <pad> w1 w6 <pad> w2 w7")
    assert ids == ([11, 48, 12, 49, 13] if add_markers else [11, 0, 7, 12, 0, 8, 13])
    assert ("w1" in tokenizer.decode(ids, skip_special_tokens=True).split()) is True


@pytest.mark.parametrize(
    "opening, closing", [("w1", "w1 w2"), ("w1 w2", "w2"), ("w1 w2 w3", "w2"), ("w2", "w1 w2")]
)
def test_a_marker_inside_the_other_is_refused(opening, closing):
    """A reader of the text could not tell where the thought ends."""
    with pytest.raises(ConfigError, match="one stands inside the other"):
        find_markers(word_tokenizer(), ThoughtConfig(open_marker=opening, close_marker=closing))


def test_equal_markers_are_refused():
    with pytest.raises(
        ConfigError, match="thought.close_marker must differ from thought.open_marker"
    ):
        ThoughtConfig(open_marker="<think>", close_marker="<think>")


@pytest.fixture(scope="module")
def with_markers(tmp_path_factory, model_folder) -> Path:
    """The model of the tests after `rlp add-markers`."""
    folder = tmp_path_factory.mktemp("markers") / "model"
    assert (
        main(
            [
                "add-markers",
                str(model_folder),
                "--out",
                str(folder),
                "--open",
                TWO_WORDS["open_marker"],
                "--close",
                TWO_WORDS["close_marker"],
            ]
        )
        == 0
    )
    return folder


def test_the_command_makes_a_plain_folder(with_markers, model_folder, tmp_path, capsys):
    """Stock transformers loads it; made again it is refused, and so is a model that has the
    markers."""
    model, loading = AutoModelForCausalLM.from_pretrained(with_markers, output_loading_info=True)
    assert not any(loading[kind] for kind in ODD_KEYS)
    assert model.config.vocab_size == 50
    assert AutoTokenizer.from_pretrained(with_markers).encode("w5 <pad> w1") == [11, 48]
    old = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits[..., :48], old(ids).logits)
    words = ["--open", TWO_WORDS["open_marker"], "--close", TWO_WORDS["close_marker"]]
    for given, message in (
        ([str(model_folder), "--out", str(with_markers), *words], "never written over"),
        ([str(with_markers), "--out", str(tmp_path / "x"), *words], "as single tokens already"),
    ):
        assert main(["add-markers", *given]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [{}, {"engine__zero_stage": 3, "baseline__kind": "frozen", "objective__kl_weight": 0.1}],
)
def test_a_run_with_added_markers_is_the_run_of_a_model_that_has_them(
    trained, with_markers, settings, ranks, tmp_path, corpus
):
    """Policy, teacher and frozen start alike, sharded as they are built too; and its export needs
    no key."""
    added = trained("added", **settings, **ADDED)
    texts = {f"thought__{key}": f"'{text}'" for key, text in TWO_WORDS.items()}
    assert_same_run(added, trained("had", **settings, **texts, model__path=with_markers), 1e-6)
    weights, other = exported(added), exported(tmp_path / "had")
    assert (
        all(torch.equal(weights[name], other[name]) for name in weights)
        and weights.keys() == other.keys()
    )
    assert len(weights["model.embed_tokens.weight"]) == 50
    model, loading = AutoModelForCausalLM.from_pretrained(
        added / "export", output_loading_info=True
    )
    assert model.config.vocab_size == 50 and not any(
        loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    manifest = json.loads((added / "export" / "thought_format.json").read_text())
    assert (
        manifest["open_marker_ids"],
        manifest["close_marker_ids"],
        manifest["excluded_from_targets"],
    ) == ([48], [49], 48)
    read = ModelSetup(tiny_config(tmp_path / "next", added / "export", corpus, **texts))
    assert read.markers == Markers(open=(48,), close=(49,)) and read.marker_notes() == []


def test_a_run_with_added_markers_resumes_and_only_with_them(
    trained, tmp_path, model_folder, corpus, ranks
):
    """Bit for bit where it was; without the key, the other tokenizer is refused."""
    whole = trained("whole", **ADDED, budget__steps=4, checkpoint__every_n_steps=2)
    step = whole / "checkpoints" / "step_2"
    continued = trained("continued", **ADDED, budget__steps=4, run__resume=step)
    table = "model.embed_tokens.weight"
    assert exported(continued)[table].equal(exported(whole)[table])
    texts = {f"thought__{key}": f"'{text}'" for key, text in TWO_WORDS.items()}
    with pytest.raises(ConfigError, match="thought.add_markers was True, is False"):
        train(
            tiny_config(
                tmp_path / "without",
                model_folder,
                corpus,
                **texts,
                budget__steps=4,
                run__resume=step,
            ),
            ranks,
        )
    shutil.rmtree(whole / "export")
    assert main(["export", str(step), "--out", str(tmp_path / "exported")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.vocab_size == 50


def test_the_ledger_counts_the_added_rows(tmp_path, model_folder, corpus):
    """Two rows of 32 numbers in the tied table of the model."""
    plain, added = (
        RunSetup(tiny_config(tmp_path / "run", model_folder, corpus, **settings), print).shapes
        for settings in ({}, ADDED)
    )
    assert (added.vocabulary, added.parameters) == (plain.vocabulary + 2, plain.parameters + 2 * 32)


def test_a_document_without_a_position_says_what_was_searched(tmp_path, corpus):
    """A marker that stands in the text as other tokens is not a marker that does not occur."""
    tokenizer = bytes_tokenizer()
    model = architecture("qwen3")
    model.vocab_size = len(tokenizer)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")
    settings = {
        "position__selector": "marker",
        "thought__open_marker": "'['",
        "thought__close_marker": "']'",
    }

    def why(marker: str, text: str) -> str:
        setup = PanelSetup(
            tiny_config(
                tmp_path / "run",
                tmp_path / "model",
                corpus,
                **settings,
                position__marker=f"'{marker}'",
            ),
            print,
        )
        return setup.why_no_position(np.array(tokenizer.encode(text)))

    said = why("ab", "c ab c")
    assert (
        "position.marker 'ab' is in the text, written with other tokens, | ab|; write it as" in said
    )
    assert "as they are read, ' ab'; searched: token ids" in said
    searched = f"searched: token ids {tokenizer.encode('xy')}, |x|y|"
    assert f"'xy' does not occur; {searched}" in why("xy", "c ab c")
    assert "' ab' stands only where no position may be" in why(" ab", "c ab")


def test_start_and_dry_run_say_it(trained, tmp_path, model_folder, corpus, ranks, capsys):
    """Before the first step, and before a run."""
    texts = {f"thought__{key}": f"'{text}'" for key, text in TWO_WORDS.items()}
    trained("several", **texts, budget__steps=1)
    assert "WARNING: thought.open_marker" in capsys.readouterr().out
    assert (
        "WARNING: thought.open_marker"
        in Trainer(tiny_config(tmp_path / "x", model_folder, corpus, **texts), ranks=ranks).plan()
    )
    assert (
        "thought.add_markers: added"
        in Trainer(tiny_config(tmp_path / "x", model_folder, corpus, **ADDED), ranks=ranks).plan()
    )


@pytest.mark.parametrize("lay_out", [repeated_layout, tree_layout])
def test_the_loss_of_a_document_trains_its_markers(lay_out):
    """The open marker is left out of the targets of thoughts, not of the next-token loss: that is
    the softmax of transformers over all words."""
    policy, ids = tiny_policy(), [9, 10, 2, 11, 12, 3, 13]
    if lay_out is tree_layout:
        policy.lm.set_attn_implementation(register("sdpa"))
    thought_format = ThoughtFormat(
        markers=Markers(open=(2,), close=(3,)),
        instruction=(),
        begin=None,
        temperature=0.7,
        target_temperature=1.0,
        horizon=1,
    )
    layout = lay_out(
        [Document(id=0, tokens=np.array(ids))],
        None,
        None,
        thought_format,
        lm=True,
        no_think=False,
        device=policy.device,
    )
    loss = -score(policy, layout).document.mean()
    plain = tiny_policy().lm
    expected = plain(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    torch.testing.assert_close(loss, expected)
    gradients = [
        torch.autograd.grad(one, model.get_output_embeddings().weight)[0]
        for one, model in ((loss, policy.lm), (expected, plain))
    ]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


GSM = [
    json.dumps(
        {
            "question": f"{a} and {b}?",
            "answer": f"{a}+{b} = <<{a}+{b}={a + b}>>{a + b} in all.\n#### {a + b}",
        }
    )
    for a in range(8)
    for b in range(4)
]
"""Problems with their annotations, as GSM8K writes them."""


def test_the_commands_of_the_warm_start_work(tmp_path, monkeypatch, capsys, ranks):
    """Every command of docs/warm_start.md, on tiny data, in its order: each reads what the one
    before it wrote."""
    monkeypatch.chdir(tmp_path)
    for module in ("rlp.process.ranks", "rlp.measure.probe"):
        monkeypatch.setattr(f"{module}.stop_ranks", lambda: None)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("\n".join(GSM) + "\n")
    tokenizer, config = bytes_tokenizer(), architecture("qwen3")
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained("MODEL")
    tokenizer.save_pretrained("MODEL")

    small = [
        "thought.max_thought_tokens=4",
        "evaluation.panel_positions=32",
        "evaluation.batch_size=32",
    ]
    run = [
        *small,
        "budget.tokens=null",
        "budget.steps=1",
        "optim.batch_size=4",
        "evaluation.panel_positions=4",
    ]
    blocks = re.findall(
        r"```sh\n(.*?)```", (REPOSITORY / "docs" / "warm_start.md").read_text(), flags=re.DOTALL
    )
    commands = [line for block in blocks for line in block.splitlines()]
    for command in commands:
        words = shlex.split(command)
        if words[0] in ("mkdir", "sed"):
            subprocess.run(command, shell=True, check=True)
        elif words[:2] == ["python", "train.py"]:
            assert program.main([*words[2:], *run]) == DONE, command
        else:
            assert words[:2] == ["rlp", "probe"] and main([*words[1:], *small]) == 0, command
    said = capsys.readouterr().out
    assert said.count("thought.add_markers: added") == 2 and said.count("SIGNAL: ") == 2
    assert "gain over the start" in said
    document = read_lines(tmp_path / "data" / "warm" / "thoughts.jsonl")[1]
    assert document["answer"] == "0+1 = <think>0+1=1</think>1 in all.\n#### 1"
    exported_tokenizer = AutoTokenizer.from_pretrained("runs/warm_rlp/export")
    assert exported_tokenizer.convert_tokens_to_ids("<think>") == len(tokenizer)
    thoughts = read_lines(tmp_path / "runs" / "warm_rlp" / "thoughts.jsonl")
    assert all(thought["prefix_tail"].endswith(" = ") for thought in thoughts)

"""The language of thoughts in training: the same numbers as of their texts, the term of the reward
by hand, and a step that is bit-equal without it."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlp.measure.journal import audit
from rlp.measure.language import letters_of
from rlp.measure.monitor import COLLAPSE_STEPS, Watch
from rlp.measure.thought_language import ThoughtLanguage
from rlp.measure.thought_statistics import token_scripts
from rlp.model.thoughts import Thoughts
from rlp.objective import group_relative_advantage, with_language
from rlp.process.exit_codes import DONE
from rlp.step.reward import Evidence, open_reward, rewards_of
from tests.tiny_models import WORDS
from tests.training import assert_same_run, read_lines, tiny_config, train, write_corpus

CLOSE = 0
LETTERS = 257
"""The first whole token, "ab": the one that ends a thought and 256 bytes stand before it."""

PIECES = ("ab", " cd", "\u0431\u0432", "x\u03b1", "\u6771\u306f", "12", " +", "\u05d0", "e\u0301")
"""Whole tokens: of one script, of two, of one family, neutral, with a mark."""


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer of bytes and a few whole tokens: other letters come in two or three pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = ["".join(part for part, _ in level.pre_tokenize_str(piece)) for piece in PIECES]
    vocabulary = {token: index for index, token in enumerate(["</t>", *alphabet, *whole])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</t>")


def thoughts_of(rows):
    """Closed thoughts [M, G] of token lists without their close marker."""
    longest = max(len(row) for group in rows for row in group) + 1
    tokens = torch.full((len(rows), len(rows[0]), longest), LETTERS)  # behind a thought
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for m, group in enumerate(rows):
        for g, row in enumerate(group):
            tokens[m, g, : len(row) + 1] = torch.tensor([*row, CLOSE])
            mask[m, g, : len(row) + 1] = True
    shape = tokens.shape
    truncated = torch.zeros(shape[:2], dtype=torch.bool)
    return Thoughts(tokens, mask, torch.zeros(shape), torch.zeros(shape), truncated)


@pytest.mark.parametrize("target", ["latin", "cyrillic", "japanese", None])
def test_the_language_of_tokens_is_that_of_their_text(bytewise, target):
    """And not of what stands behind it. Of 300 random thoughts, of whole tokens alone and with
    pieces of characters among them."""
    generator, size = np.random.default_rng(0), len(bytewise)
    whole = list(range(size - len(PIECES), size))
    rows = [
        [
            generator.choice(whole, generator.integers(0, 6)).tolist(),
            generator.integers(1, size, generator.integers(1, 8)).tolist(),
            [*bytewise.encode("\u0431a\u6771"), *generator.choice(whole, 2).tolist()],
        ]
        for _ in range(100)
    ]
    scripts = token_scripts(bytewise, size + 5, target=target)
    found = ThoughtLanguage(bytewise, scripts, target, close_tokens=1).of(thoughts_of(rows))
    for m, group in enumerate(rows):
        for g, row in enumerate(group):
            text = letters_of(bytewise.decode(row, skip_special_tokens=True))
            assert (found.letters[m, g], found.switches[m, g]) == (text.letters, text.switches)
            assert found.purity[m, g] == pytest.approx(text.purity, rel=1e-12)
            if target is not None:
                assert found.share[m, g] == pytest.approx(text.share(target), rel=1e-12)
    assert (found.share is None) == (target is None)
    assert 0 < int((found.switches == 0).sum()) < found.switches.numel()


def test_the_reward_and_the_term_by_hand():
    """r = S_pred - S_ema = 1, 2, 0; lambda 0.5; shares 1, 0, 0.5: 1.5, 2, 0.25. Advantages are 3/2
    of what is above the mean 1.25."""
    evidence = Evidence(
        reasoned_logprob=torch.tensor([[-1.0, 0.0, -2.0]]),
        baseline_logprob=torch.tensor([-2.0]),
        matched=None,
        documents=[],
        positions=None,
        thoughts=None,
        script_share=torch.tensor([[1.0, 0.0, 0.5]]),
    )
    reward = open_reward("information_gain")
    paid = rewards_of(reward, evidence, 0.5)
    assert paid.tolist() == [[1.5, 2.0, 0.25]]
    assert group_relative_advantage(paid).tolist() == [[0.375, 1.125, -1.5]]
    assert rewards_of(reward, evidence).tolist() == [[1.0, 2.0, 0.0]]
    assert with_language(torch.zeros(1, 2), torch.tensor([[1.0, 0.25]]), 2.0).tolist() == [[2, 0.5]]


@pytest.mark.parametrize(
    "metric, words",
    [
        ("thought/mixed_scripts_frac", "thoughts mix scripts: 30% of them over the last 5 steps"),
        ("thought/script_switch_frac", "thoughts leave the script of the text: 30% of them"),
    ],
)
@pytest.mark.parametrize("cut", [0, 4, 13])
def test_switching_that_rises_is_said_once(metric, words, cut):
    """By a tenth of all thoughts over the first steps, five steps in a row, and through a
    checkpoint; mixing that was always there is not told."""
    steps = [0.1] * COLLAPSE_STEPS + [0.3, 0.19, 0.3, None, 0.3, 0.3, 0.3, 0.3, 0.9]
    watch, said = Watch(), []
    for index, value in enumerate(steps):
        if index == cut:
            saved, watch = json.loads(json.dumps(watch.state())), Watch()
            watch.load_state(saved)
        said.append(watch.see({} if value is None else {metric: value}))
    told = [index for index, alarms in enumerate(said) if alarms]
    assert told == [17] and words in said[17][0] and "10% over the first 10" in said[17][0]

    steady = Watch()
    assert not any(steady.see({metric: 0.5 + 0.09 * (step >= 10)}) for step in range(40))


def test_a_checkpoint_that_knows_nothing_of_switching_is_continued():
    watch = Watch()
    state = {k: v for k, v in watch.state().items() if k not in ("starts", "risen")}
    watch.load_state(state)
    assert not any(watch.see({"thought/mixed_scripts_frac": 0.0}) for _ in range(20))


# Runs


@pytest.fixture(scope="module")
def two_scripts(tmp_path_factory, model_folder):
    """The tiny model with words of two scripts, and documents of them."""
    folder = tmp_path_factory.mktemp("two_scripts")
    words = [
        word if index < 27 else f"\u0436\u0437{chr(0x430 + index % 32)}"
        for index, word in enumerate(WORDS)
    ]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<think>", "</think>"],
    )
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fast.save_pretrained(folder)
    generator = np.random.default_rng(0)
    documents = [
        " ".join(words[i] for i in generator.integers(6, len(words), size=9)) for _ in range(12)
    ]
    return folder, write_corpus(folder / "train.jsonl", documents)


def language_of(told):
    """Of a thought as it is told, with special tokens in words."""
    return letters_of(" ".join(word for word in told["thought"].split() if word[0] != "<"))


def run_of(path, two_scripts, ranks, **settings):
    model, corpus = two_scripts
    settings = {"logging__journal": True, "logging__digest_every_n_steps": 1} | settings
    settings |= {"logging__thoughts": 256}
    path.parent.mkdir(exist_ok=True)
    assert train(tiny_config(path, model, corpus, **settings), ranks) == DONE
    return path


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, two_scripts, ranks):
    return run_of(tmp_path_factory.mktemp("plain") / "run", two_scripts, ranks)


def test_without_a_weight_a_step_is_bit_equal_and_its_language_is_logged(
    plain_run, tmp_path, two_scripts, ranks
):
    """A script alone is watched and not paid for."""
    watched = run_of(tmp_path / "run", two_scripts, ranks, reward__script="cyrillic")
    assert audit(watched, plain_run) == []
    by_step = {line["step"]: line for line in read_lines(watched / "metrics.jsonl")}
    told = read_lines(watched / "thoughts.jsonl")
    for step, line in by_step.items():
        of_step = [language_of(one) for one in told if one["step"] == step]
        texts = [one for one in of_step if one.letters]
        assert line["thought/target_script_frac"] == pytest.approx(
            np.mean([one.share("cyrillic") for one in texts])
        )
        assert line["thought/script_switches"] == pytest.approx(
            np.mean([one.switches for one in texts])
        )
        assert 0 < line["thought/mixed_scripts_frac"] < 1 and "reward/language" not in line
    plain = read_lines(plain_run / "metrics.jsonl")[0]
    assert "thought/target_script_frac" not in plain
    assert plain["thought/script_switches"] == by_step[1]["thought/script_switches"]


@pytest.fixture(scope="module")
def paid_run(tmp_path_factory, two_scripts, ranks):
    path = tmp_path_factory.mktemp("paid") / "run"
    return run_of(path, two_scripts, ranks, reward__script="cyrillic", reward__language_weight=2.0)


def test_the_term_is_part_of_the_reward_and_the_gain_is_still_told(paid_run):
    """Over all thoughts of a step, and thought by thought; an empty thought gets all of it."""
    for line in read_lines(paid_run / "metrics.jsonl"):
        parts = line["gain/mean"] + line["reward/language"]
        assert line["reward/mean"] == pytest.approx(parts, abs=1e-5)
    told = read_lines(paid_run / "thoughts.jsonl")
    assert len(told) == 3 * 4 * 2 * 4
    for one in told:
        share = language_of(one).share("cyrillic")
        assert one["script_share"] == pytest.approx(share)
        assert one["reward"] == pytest.approx(one["gain"] + 2 * share, abs=1e-5)


def test_the_term_changes_the_update_and_no_thought_of_the_first_step(paid_run, plain_run):
    differences = audit(paid_run, plain_run)
    assert any(one.startswith("step 1: state") for one in differences)
    assert not any(one.startswith("step 1: thoughts") for one in differences)


@pytest.mark.parametrize(
    "cut", [{"optim__micro_batch_size": 1}, {"optim__thoughts_per_forward": 3}]
)
def test_however_a_step_is_cut_the_term_is_the_same(paid_run, tmp_path, two_scripts, ranks, cut):
    """Groups in slices are rewarded ahead of their pass with gradient."""
    paid = {"reward__script": "cyrillic", "reward__language_weight": 2.0}
    assert_same_run(run_of(tmp_path / "run", two_scripts, ranks, **paid, **cut), paid_run, 1e-5)

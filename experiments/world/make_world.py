"""The heading world: documents whose next word needs a thought, from one seed.

A traveller faces north and makes six turns. A problem names the turns and asks for the last
heading:

    one right two left three around four straight five right six left faces south .

A thought, between `<think>` and `</think>`, writes the heading after every turn:

    <think> one east two north three south four south five west six south </think>

With right = 1, around = 2, left = 3 the headings are running sums modulo 4,

    heading_u = heading_{u-1} + turn_u  (mod 4),      heading_0 = north = 0,

so each word of the thought is one addition away from the words before it, while the word after
`faces` without a thought is a sum of six.

Splits. There are 4^6 = 4096 questions. One permutation of them, keyed by the seed, is cut into
three
disjoint blocks: 2560 for `base_train`, 1024 for `train`, 512 for `held_out`. A file holds questions
of its own block only, so no question of one file is in another.

Files written to --out, all a function of the seed:

    base_train.jsonl    with thoughts, for the language-model loss; read once, in order
    train.jsonl         without thoughts, for RLP
    held_out.jsonl      without thoughts, every held-out question exactly once
    tokenizer/          one token per word
    model_config.json   Qwen3Config for a random start
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import rlp  # noqa: F401, before torch, which transformers loads: see rlp/process/machine.py

# isort: split
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

MARKS = ("one", "two", "three", "four", "five", "six")
TURNS = ("straight", "right", "around", "left")
HEADINGS = ("north", "east", "south", "west")
CUE = "faces"
OPEN, CLOSE = "<think>", "</think>"
VOCABULARY = ("<pad>", "<unk>", "<eos>", OPEN, CLOSE, ".", CUE, *MARKS, *TURNS, *HEADINGS)

PROBLEMS_PER_DOCUMENT = 2
BLOCKS = {"base_train": 2560, "train": 1024, "held_out": 512}
"""Questions per split; the sum is every question there is."""

CLEAN_DOCUMENTS = 22_400
"""First part of base_train: 700 steps of 32. Right thoughts only; the model learns them after 250
to 500 steps."""
CLEAN_THOUGHT_FRAC = 0.8
"""Problems with a thought in the first part. The rest keeps the prediction without a thought in
training."""
SLIPPING_DOCUMENTS = 9_600
"""Second part of base_train: 300 steps of 32."""
SLIPPING_THOUGHT_FRAC = 0.5
SLIP = 0.1
"""Chance that a step of a thought in the second part takes a wrong turn; 0.9^6 = 0.53 of thoughts
are then right."""
TRAIN_EPOCHS = 4
"""Times that each question of the train block appears in train.jsonl, in different company."""


def turns_of(question: int) -> list[int]:
    """The six turns of a question: its index written in base 4, lowest digit first."""
    return [question // 4**u % 4 for u in range(len(MARKS))]


def headings_after(turns: Sequence[int]) -> list[int]:
    """The heading after every turn: running sums modulo 4, from north."""
    headings, heading = [], 0
    for turn in turns:
        heading = (heading + turn) % 4
        headings.append(heading)
    return headings


def slipped(turns: Sequence[int], slip: float, rng: random.Random) -> list[int]:
    """The turns as a careless traveller takes them: each is replaced with probability `slip` by a
    wrong one.

    A thought written from these goes on from its mistake, as a sampled thought does.
    """
    return [(turn + rng.randrange(1, 4)) % 4 if rng.random() < slip else turn for turn in turns]


def problem_text(turns: Sequence[int], thought_turns: Sequence[int] | None = None) -> str:
    """One problem with its true answer, and the thought that `thought_turns` lead to if there is
    one."""
    question = [word for mark, turn in zip(MARKS, turns) for word in (mark, TURNS[turn])]
    thought: list[str] = []
    if thought_turns is not None:
        steps = zip(MARKS, headings_after(thought_turns))
        thought = [
            OPEN,
            *(word for mark, heading in steps for word in (mark, HEADINGS[heading])),
            CLOSE,
        ]
    return " ".join([*question, CUE, *thought, HEADINGS[headings_after(turns)[-1]], "."])


def split_questions(seed: int) -> dict[str, list[int]]:
    """The question indices of every split: disjoint blocks of one permutation."""
    questions = list(range(4 ** len(MARKS)))
    random.Random(f"split {seed}").shuffle(questions)
    blocks, start = {}, 0
    for name, size in BLOCKS.items():
        blocks[name] = questions[start : start + size]
        start += size
    return blocks


def documents_with_thoughts(
    questions: Sequence[int], count: int, thought_frac: float, slip: float, rng: random.Random
) -> Iterator[str]:
    """`count` documents of random problems, a fraction `thought_frac` of them with a thought."""
    for _ in range(count):
        problems = []
        for _ in range(PROBLEMS_PER_DOCUMENT):
            turns = turns_of(rng.choice(questions))
            thinks = rng.random() < thought_frac
            problems.append(problem_text(turns, slipped(turns, slip, rng) if thinks else None))
        yield " ".join(problems)


def plain_documents(questions: Sequence[int], epochs: int, rng: random.Random) -> Iterator[str]:
    """Documents without thoughts in which every question appears `epochs` times."""
    for _ in range(epochs):
        order = rng.sample(questions, len(questions))
        for start in range(0, len(order), PROBLEMS_PER_DOCUMENT):
            group = order[start : start + PROBLEMS_PER_DOCUMENT]
            yield " ".join(problem_text(turns_of(question)) for question in group)


def make_documents(seed: int) -> dict[str, list[str]]:
    """The documents of every split, in the order of their file."""
    questions = split_questions(seed)
    rng = {name: random.Random(f"{name} {seed}") for name in BLOCKS}
    base, base_rng = questions["base_train"], rng["base_train"]
    return {
        "base_train": [
            *documents_with_thoughts(base, CLEAN_DOCUMENTS, CLEAN_THOUGHT_FRAC, 0.0, base_rng),
            *documents_with_thoughts(
                base, SLIPPING_DOCUMENTS, SLIPPING_THOUGHT_FRAC, SLIP, base_rng
            ),
        ],
        "train": list(plain_documents(questions["train"], TRAIN_EPOCHS, rng["train"])),
        "held_out": list(plain_documents(questions["held_out"], 1, rng["held_out"])),
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; text is split at spaces and decoded with spaces."""
    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=[OPEN, CLOSE],
        clean_up_tokenization_spaces=False,  # "west ." stays two words
    )


def make_model_config() -> Qwen3Config:
    """Two layers, 84,992 parameters: enough for one addition a word, not for a sum of six."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.1,  # at this width the default 0.02 does not learn
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=None,
        eos_token_id=VOCABULARY.index("<eos>"),
    )


def write_jsonl(path: Path, documents: Iterable[str]) -> None:
    """One {"text": document} per line."""
    path.write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="ascii"
    )


def write_world(out: Path, seed: int) -> None:
    """Write every file of the world to a folder that is absent or empty.

    Raises:
        ValueError: `out` is a file or a folder with something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"--out {out} already holds files; give an empty or absent folder, or remove it first."
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in make_documents(seed).items():
        write_jsonl(out / f"{name}.jsonl", documents)
    make_tokenizer().save_pretrained(out / "tokenizer")
    make_model_config().to_json_file(out / "model_config.json", use_diff=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write the heading world: documents, tokenizer, model config."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; absent or empty")
    parser.add_argument("--seed", type=int, default=0, help="keys the split and the documents")
    arguments = parser.parse_args()
    try:
        write_world(arguments.out, arguments.seed)
    except ValueError as error:
        print(f"make_world: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

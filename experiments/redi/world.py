"""Sums modulo 16, step by step; a start that fine-tuning on right traces improves no more; and what
models write.

    3 9 4 15 8 = <think> 3 12 0 15 7 </think> 7 .

A thought writes the running sum after every number, so each word is one addition of the word before
and a number of the question: 256 additions in all. The model (one layer, 12 thousand parameters)
has read right traces of so few questions that some additions are not known, and slips there.

    base     fine-tuned on right traces of `GIVEN` questions until their loss is gone
    pairs    its own traces at `POOL` questions: kept where right, rejected where wrong
    start    the base, fine-tuned on the given traces and on those that were kept, until that helps
             no more on held-out questions
    own      pairs from traces of the start itself, at `FRESH` questions
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlp.post.traces import TraceRule, filter_traces
from rlp.world.folder import make_model_config, make_tokenizer
from rlp.world.problems import CLOSE, OPEN, disjoint_blocks

MODULUS, NUMBERS = 16, 5
VOCABULARY = ("<pad>", "<unk>", "<eos>", OPEN, CLOSE, ".", "=", *map(str, range(MODULUS)))
WORDS = make_tokenizer(VOCABULARY)
GIVEN, POOL, HELD_OUT, FRESH = 240, 512, 512, 1024
WIDTH = 32
PROMPT_TOKENS = NUMBERS + 2
TRACE_TOKENS = NUMBERS + 4
"""A thought, the close marker, the answer, a full stop and the end."""

BASE_STEPS, START_STEPS, BATCH = 600, 450, 32
BASE_RATE, START_RATE = 3e-3, 1e-3
PARTS = 3
"""Of the fine-tuning of the start, behind each of which it is read."""
POOL_TRACES = 8
SAMPLES = 8
"""Traces at a held-out question, from which pass@1 and pass@8 are estimated."""


CPU = torch.device("cpu")

# Questions


def questions_of(seed: int) -> dict[str, list[list[int]]]:
    """Numbers of the questions of every block; no question is in two."""
    sizes = {"given": GIVEN, "pool": POOL, "held_out": HELD_OUT, "fresh": FRESH}
    blocks = disjoint_blocks(MODULUS**NUMBERS, sizes, f"redi {seed}")
    return {name: [_numbers(one) for one in block] for name, block in blocks.items()}


def _numbers(question: int) -> list[int]:
    return [question // MODULUS**place % MODULUS for place in range(NUMBERS)]


def prompt_of(numbers: Sequence[int]) -> str:
    return " ".join([*map(str, numbers), "=", OPEN])


def trace_of(numbers: Sequence[int]) -> str:
    """The right one."""
    total, words = 0, []
    for number in numbers:
        total = (total + number) % MODULUS
        words.append(str(total))
    return " ".join([*words, CLOSE, words[-1], "."])


def is_right(numbers: Sequence[int], trace: str) -> bool:
    """Whether the word behind the thought is the answer."""
    words = trace.split()
    answer = str(sum(numbers) % MODULUS)
    return CLOSE in words[:-1] and words[words.index(CLOSE) + 1] == answer


def first_wrong(numbers: Sequence[int], trace: str) -> int | None:
    """Index of the first character of the first word that is not the right trace's; None where the
    trace has no such word."""
    place = 0
    for word, right in zip(trace.split(), trace_of(numbers).split()):
        if word != right:
            return place
        place += len(word) + 1
    return None


def sound_after_slip(numbers: Sequence[int], trace: str) -> list[int]:
    """Indices of words behind the first wrong one that are right where they stand: the sum of the
    word before and the next number, the marker, the last sum as the answer, the full stop."""
    words, right = trace.split(), trace_of(numbers).split()
    wrong = [index for index, (one, other) in enumerate(zip(words, right)) if one != other]
    if not wrong:
        return []
    found = []
    for index in range(wrong[0] + 1, min(len(words), NUMBERS + 3)):
        before = words[index - 1]
        if index < NUMBERS:
            sound = before.isdigit() and words[index] == str(
                (int(before) + numbers[index]) % MODULUS
            )
        elif index == NUMBERS + 1:
            sound = words[index] == words[NUMBERS - 1]
        else:
            sound = words[index] == right[index]
        if sound:
            found.append(index)
    return found


# Models


def new_model(seed: int) -> PreTrainedModel:
    config = make_model_config(VOCABULARY)
    config.hidden_size, config.intermediate_size = WIDTH, 2 * WIDTH
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = WIDTH // 2
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def fine_tune(
    model: PreTrainedModel,
    rows: Sequence[tuple[str, str]],
    steps: int,
    rate: Callable[[int], float],
    rng: random.Random,
) -> None:
    """The loss is on the traces and their ends."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        ids, mask = padded(rng.choices(rows, k=BATCH))
        loss = model(
            input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~behind_prompt(mask), -100)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def padded(rows: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, P] tokens of prompts with traces and their ends, and where there are any."""
    batch = WORDS(
        [f"{prompt} {trace} <eos>" for prompt, trace in rows], padding=True, return_tensors="pt"
    )
    return batch.input_ids, batch.attention_mask


def behind_prompt(mask: torch.Tensor) -> torch.Tensor:
    return (mask > 0) & (torch.arange(mask.shape[1]) >= PROMPT_TOKENS)


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, rows: Sequence[tuple[str, str]]) -> list[torch.Tensor]:
    """Of each trace the log-probabilities of its tokens and its end, nats."""
    model.eval()
    ids, mask = padded(rows)
    scores = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    logprob = scores.gather(2, ids[:, 1:, None])[:, :, 0]
    where = behind_prompt(mask)[:, 1:]
    return [one[counts] for one, counts in zip(logprob, where)]


@torch.no_grad()
def sampled(
    model: PreTrainedModel, questions: Sequence[Sequence[int]], count: int, seed: int
) -> list[list[str]]:
    """`count` traces at each question, at temperature 1."""
    model.eval()
    torch.manual_seed(seed)
    prompts = [prompt_of(numbers) for numbers in questions for _ in range(count)]
    ids = torch.tensor(WORDS(prompts).input_ids)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=TRACE_TOKENS,
        pad_token_id=WORDS.pad_token_id,
    )
    said = [
        text.partition("<eos>")[0].strip() for text in WORDS.batch_decode(made[:, ids.shape[1] :])
    ]
    return [said[start : start + count] for start in range(0, len(said), count)]


# What an arm begins with


def make_start(home: Path, seed: int, read: Callable[[str, int, PreTrainedModel], None]) -> None:
    """The folder `start` and pairs.jsonl of a seed.

    Args:
        read: is shown the base and the start on its way: name, steps, model.
    """
    questions, rng = questions_of(seed), random.Random(f"redi {seed}")
    given = [(prompt_of(numbers), trace_of(numbers)) for numbers in questions["given"]]
    model = new_model(seed)
    fine_tune(model, given, BASE_STEPS, _falling(BASE_RATE, BASE_STEPS), rng)
    read("base", 0, model)

    write_pairs(home / "pairs.jsonl", model, questions["pool"], seed)
    kept = read_rows(home / "traces_pairs" / "kept.jsonl")
    rows = [*given, *((row["prompt"], row["completion"]) for row in kept)]
    steps = START_STEPS // PARTS
    for part in range(1, PARTS + 1):
        last = part == PARTS
        fine_tune(
            model, rows, steps, _falling(START_RATE, steps) if last else lambda _: START_RATE, rng
        )
        read("start", part * steps, model)
    model.save_pretrained(home / "start")
    WORDS.save_pretrained(home / "start")


def write_pairs(
    path: Path, model: PreTrainedModel, questions: Sequence[Sequence[int]], seed: int
) -> None:
    """Pairs of a model's own traces, by `rlp traces`, whose folder stays beside them."""
    rollouts = [
        {"prompt": prompt_of(numbers), "completion": trace, "right": is_right(numbers, trace)}
        for numbers, traces in zip(questions, sampled(model, questions, POOL_TRACES, seed))
        for trace in traces
    ]
    source, out = path.with_name(f"rollouts_{path.name}"), path.with_name(f"traces_{path.stem}")
    write_rows(source, rollouts)
    counts = filter_traces(source, out, TraceRule(), with_pairs=True)
    print(counts.in_words(), flush=True)
    write_rows(path, _with_slips(out / "pairs.jsonl"))


def _falling(rate: float, steps: int) -> Callable[[int], float]:
    """Up over 30 steps, and down to a tenth over the last third."""
    return lambda step: rate * min(1, (step + 1) / 30, max(0.1, (steps - step) / (steps / 3)))


def _with_slips(path: Path) -> list[dict]:
    """Pairs, with the character at which the rejected goes wrong; not those that only end early."""
    found = []
    for row in read_rows(path):
        numbers = [int(word) for word in row["prompt"].split()[:NUMBERS]]
        slip = first_wrong(numbers, row["rejected"])
        if slip is not None:
            found.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
            found[-1]["first_wrong"] = slip
    return found


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

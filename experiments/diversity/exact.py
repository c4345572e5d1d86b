"""The chance of each number from 1 to 10, exactly, where the answer has begun with some words: no
draw, every temperature from the same logits.

    p(n) = prod_u softmax(logits_u / T)[token u of n] * (1 - the chance that a digit follows)

A model that writes a list, or explains, draws no number; begun with `LEAD` it has to.
"""

from pathlib import Path

import numpy as np
import torch
from cells import FOCUS, STAGES, TEMPERATURES

from rlp.post.diversity_drawing import Drawing, written

LEAD = "I pick the number"

NUMBERS = range(1, 11)


def exact_lines(stage: str, form: str, models: Path) -> list[dict]:
    """Of one stage in one format: a line for each temperature, over the whole distribution."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models / STAGES[stage]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = written(FOCUS["numbers"][0], Drawing(format=form), tokenizer)
    text = f"{asked}{LEAD if form == 'chat' else f' {LEAD}'}"
    logits = {number: _logits(model, tokenizer, text, f" {number}") for number in NUMBERS}
    is_digit = _digits(tokenizer, model.config.vocab_size)
    return [
        _line(
            stage, form, temperature, [_chance(*logits[n], is_digit, temperature) for n in NUMBERS]
        )
        for temperature in TEMPERATURES
    ]


def _logits(model, tokenizer, text: str, more: str) -> tuple[np.ndarray, list[int]]:
    """[u + 1, V] logits before each token of `more` and after the last, and those tokens."""
    before = tokenizer(text).input_ids
    tokens = tokenizer(text + more).input_ids[len(before) :]
    with torch.no_grad():
        found = model(torch.tensor([before + tokens])).logits[0, len(before) - 1 :]
    return found.double().numpy(), tokens


def _digits(tokenizer, vocabulary: int) -> np.ndarray:
    """[V] bool, which tokens go on with a digit."""
    texts = tokenizer.batch_decode([[token] for token in range(min(vocabulary, len(tokenizer)))])
    found = np.zeros(vocabulary, dtype=bool)
    found[: len(texts)] = [text[:1].isdigit() for text in texts]
    return found


def _chance(
    logits: np.ndarray, tokens: list[int], is_digit: np.ndarray, temperature: float
) -> float:
    """Of one number."""
    scaled = logits / temperature
    share = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    written_out = np.prod([share[u, token] for u, token in enumerate(tokens)])
    return float(written_out * (1 - share[-1, is_digit].sum()))


def _line(stage: str, form: str, temperature: float, chances: list[float]) -> dict:
    """`counts` are chances here, and `valid` their sum."""
    mass = sum(chances)
    shares = np.array(chances) / mass
    return {
        "arm": form,
        "seed": 0,
        "stage": stage,
        "panel": "numbers_exact",
        "temperature": temperature,
        "n": None,
        "valid": mass,
        "counts": chances,
        "top_share": float(shares.max()),
        "entropy": float(-(shares * np.log(shares)).sum()),
    }

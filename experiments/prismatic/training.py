"""Bases, students and what is measured of a set of documents."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from world import ANSWER, ID, VOCABULARY, Problem, World

from rlp.post.diversity_measures import entropy, tfidf, vendi
from rlp.post.selection import g_vendi, gradient_features, unit_rows
from rlp.world.folder import make_model_config

BASE_STEPS, BASE_BATCH, BASE_RATE = 1200, 64, 3e-3
STEPS, BATCH, RATE = 80, 32, 1e-3
"""Of a student."""


def tokens_of(problems: Sequence[Problem]) -> torch.Tensor:
    """[N, T] int64; all are of one length."""
    return torch.tensor([[ID[word] for word in one.text.split()] for one in problems])


def untrained(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(make_model_config(VOCABULARY))


def make_base(world: World, seed: int) -> torch.nn.Module:
    """Two layers that have read the old edition."""
    model, rng = untrained(seed), random.Random(f"prismatic base {seed}")
    batches = (
        [world.any_problem(rng, old=True) for _ in range(BASE_BATCH)] for _ in range(BASE_STEPS)
    )
    fit(model, batches, BASE_STEPS, BASE_RATE)
    return model


def fit(model: torch.nn.Module, batches, steps: int, rate: float) -> None:
    """Answers alone are predicted; the rate rises over a tenth and falls over the rest."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / (steps / 10), 1.1 - step / steps)
        loss = -answer_logprobs(model, tokens_of(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def answer_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[N, V]"""
    return model(input_ids=tokens[:, :ANSWER], use_cache=False, logits_to_keep=1).logits[:, 0]


def answer_logprobs(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[N] nats."""
    logprobs = answer_logits(model, tokens).log_softmax(-1)
    return logprobs.gather(1, tokens[:, ANSWER, None])[:, 0]


def student_of(
    base: torch.nn.Module, problems: Sequence[Problem], seed: int, steps: int = STEPS
) -> torch.nn.Module:
    """A copy of the base that has learned these problems."""
    model = untrained(0)
    model.load_state_dict(base.state_dict())
    rng = random.Random(f"prismatic student {seed}")
    batches = (rng.choices(problems, k=BATCH) for _ in range(steps))
    fit(model, batches, steps, RATE)
    return model


@torch.no_grad()
def accuracy(model: torch.nn.Module, problems: Sequence[Problem]) -> float:
    tokens = tokens_of(problems)
    said = torch.cat([answer_logits(model, part).argmax(-1) for part in tokens.split(512)])
    return float((said == tokens[:, ANSWER]).float().mean())


@torch.no_grad()
def nats(model: torch.nn.Module, problems: Sequence[Problem]) -> float:
    """Mean of an answer: the logarithm of its perplexity."""
    return float(-answer_logprobs(model, tokens_of(problems)).mean())


@torch.no_grad()
def hidden_features(
    model: torch.nn.Module, problems: Sequence[Problem], *, centred: bool = True
) -> np.ndarray:
    """[N, D] of length 1: the last hidden states of a document, their mean over its tokens.

    Args:
        centred: the mean document is taken off, without which all are alike.
    """
    hidden = model.base_model(input_ids=tokens_of(problems)).last_hidden_state.mean(dim=1)
    if centred:
        hidden = hidden - hidden.mean(dim=0)
    return unit_rows(hidden.numpy())


def gradients(model: torch.nn.Module, problems: Sequence[Problem]) -> np.ndarray:
    return gradient_features(model, [one.document() for one in problems], tokens_per_batch=2048)


def skill_entropy(problems: Sequence[Problem]) -> float:
    """The number of equally frequent skills that a set amounts to."""
    counts = Counter(one.skill for one in problems)
    return math.exp(entropy(np.array(list(counts.values()))))


def entry_entropy(problems: Sequence[Problem]) -> float:
    """The same of entries, a skill with a symbol."""
    counts = Counter((one.skill, one.symbol) for one in problems)
    return math.exp(entropy(np.array(list(counts.values()))))


def measures(
    problems: Sequence[Problem], proxy: torch.nn.Module, blank: torch.nn.Module
) -> dict[str, float]:
    """What is known of a set before anything is trained on it."""
    return {
        "g_vendi": g_vendi(gradients(proxy, problems)),
        "g_vendi_untrained": g_vendi(gradients(blank, problems)),
        "hidden_vendi": g_vendi(hidden_features(proxy, problems)),
        "ngram_vendi": vendi(tfidf([one.text for one in problems])),
        "nats": nats(proxy, problems),
        "skills": skill_entropy(problems),
        "entries": entry_entropy(problems),
    }

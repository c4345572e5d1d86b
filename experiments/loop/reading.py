"""What every model of the loop is read by: variety, and how far it is from the known truth."""

import json
import tempfile
from pathlib import Path

import numpy as np

from experiments.loop.world import NAMES, TOPICS, Story, Truth, story_prompt
from rlp.post.diversity import measure
from rlp.post.diversity_drawing import Drawing, draw_answers
from rlp.post.diversity_samples import read_prompts, read_samples
from rlp.post.evaluations import Reading

OPEN_SAMPLES, CLOSED_SAMPLES = 16, 2

ALIVE = 0.1
"""Of its true probability: a name that the model gives less than that is dead."""

TAIL = len(NAMES) // 2
"""Names of a topic that count as its tail: the rarer half."""


def read(reading: Reading) -> dict[str, float]:
    """All figures of a model. Settings: `world`, its folder."""
    world = Path(reading.settings["world"])
    truth = Truth(reading.seed)
    return variety(reading, world) | distances(reading.model, world, truth)


def variety(reading: Reading, world: Path) -> dict[str, float]:
    """Figures of what it writes at the temperature of the reading, none cut off."""
    drawing = Drawing(
        open_samples=OPEN_SAMPLES,
        closed_samples=CLOSED_SAMPLES,
        temperature=reading.temperature,
        top_p=1.0,
        frame="{prompt}",
        tokens=32,
        seed=reading.seed + 10_000,  # not the noise of the documents that are trained on
        rows=256,
    )
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        panel = read_prompts(world / "read.jsonl")
        draw_answers(str(reading.model), panel, drawing, samples, name="model")
        found = measure(read_samples(samples))
    opened, closed = found["open"], found["closed"]
    return {
        "open_intra": opened["intra"],
        "open_floor": opened["floor"],
        "open_duplicates": opened["duplicates"],
        "open_vendi": opened["vendi"],
        "open_entropy": opened["answer_entropy"],
        "open_distinct_2": opened["distinct_2"],
        "closed_intra": closed["intra"],
        "closed_entropy": closed["answer_entropy"],
        "accuracy": closed["accuracy"],
    }


def distances(model: Path, world: Path, truth: Truth) -> dict[str, float]:
    """Held-out loss on real text, and the distance from the truth.

    `story_kl_nats` is the mean over held-out real stories of log p_true - log p_model, given the
    topic: an unbiased estimate of KL(truth || model) with the noise of both terms in common.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    lines = (world / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    with torch.no_grad():
        loss = _nats(network, tokenizer, texts)
        prompts = [tokenizer(story_prompt(topic)).input_ids for topic in TOPICS]
        last = network(input_ids=torch.tensor(prompts)).logits[:, -1].double().softmax(dim=-1)
    stories = [n for n, text in enumerate(texts) if not text.startswith("problem")]
    # Given the topic: the words of the prompt are no part of it.
    given = [sum(loss[n][2:]) for n in stories]
    true = [truth.logprob(story_of(texts[n])) for n in stories]
    names = last[:, tokenizer.convert_tokens_to_ids(list(NAMES))].numpy()
    flat = [nats for one in loss for nats in one]
    return {
        "document_loss_nats": float(np.mean(flat)),
        "story_loss_nats": float(np.mean([np.mean(loss[n]) for n in stories])),
        "story_kl_nats": float(np.mean(given) + np.mean(true)),
    } | tails(truth.name_probabilities(), names)


def tails(true: np.ndarray, model: np.ndarray) -> dict[str, float]:
    """What is left of the names of a topic, exactly.

    Args:
        true, model: [topics, names], probabilities given the topic.
    """
    rare = np.argsort(np.argsort(true, axis=1), axis=1) < TAIL
    share = model / model.sum(axis=1, keepdims=True)
    logs = np.log(np.maximum(share, np.finfo(float).tiny))
    return {
        "tail_alive": float((model >= ALIVE * true)[rare].mean()),
        "tail_mass": float((model * rare).sum(axis=1).mean()),
        "name_entropy": float(-(share * logs).sum(axis=1).mean()),
    }


def _nats(network, tokenizer, texts: list[str]) -> list[list[float]]:
    """Of each text minus the log-probability of each token but the first, nats; texts of one length
    are run together."""
    import torch

    ids = [tokenizer(text).input_ids for text in texts]
    found: list[list[float]] = [[] for _ in texts]
    for length in sorted({len(one) for one in ids}):
        which = [n for n, one in enumerate(ids) if len(one) == length]
        rows = torch.tensor([ids[n] for n in which])
        logprob = network(input_ids=rows).logits[:, :-1].double().log_softmax(dim=-1)
        nats = -logprob.gather(2, rows[:, 1:, None])[:, :, 0]
        for n, row in zip(which, nats.tolist()):
            found[n] = row
    return found


def story_of(text: str) -> Story:
    """A real story, from its text."""
    words = text.split()
    return Story(words[0], words[3], words[6], words[9])

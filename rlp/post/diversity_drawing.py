"""Answers of a checkpoint to a panel, drawn one by one by keys and kept on disk as they come.

An answer depends on the weights, the prompt as the model reads it, the seed and its number among
the prompt's answers, and on nothing else: not on other prompts, their order, the batch, or how
often the work was interrupted. Different weights get different noise, so that answers of two models
are independent, as a mean over pairs of them wants. Bit for bit this holds in float32; in bfloat16
a row's logits depend on the rows beside it by more than many draws can bear.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from rlp.compare.asked_model import AskedModel, open_asked_model
from rlp.compare.thinker import GREEDY, Reply, Thinker
from rlp.config import ConfigError, SamplingConfig
from rlp.post.diversity_samples import DRAWN, Prompt
from rlp.process.files import append, cut, read_bytes
from rlp.sampling.opening import open_sampler

FRAME = "Question: {prompt}\nAnswer:"
"""Of a prompt in the format raw."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How answers are drawn."""

    open_samples: int = 8
    """Answers to each open prompt."""
    closed_samples: int = 4
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 0.9
    """As in arXiv 2510.22954; 1 is the whole distribution."""
    format: Literal["raw", "chat"] = "raw"
    """chat: the tokenizer's chat template, with the prompt as the one message of the user."""
    frame: str = FRAME
    """Of the format raw: the text that the model continues."""
    tokens: int = 32
    """Of an answer at most, where its prompt names none."""
    seed: int = 0
    thinks: bool = False
    """Whether a thought of the model stands before its answer."""
    thought_tokens: int | None = None
    """Of a thought at most; None: as the checkpoint was trained."""
    rows: int = 64
    """Answers that are drawn side by side."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"open_samples": 1, "closed_samples": 1, "tokens": 1, "rows": 1, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                got = getattr(self, name)
                raise ConfigError(f"{name} of a drawing must be at least {value}, got {got}.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                "a drawing has a temperature of at least 0 and a top_p above 0 and at most 1, got"
                f" {self.temperature:g} and {self.top_p:g}."
            )
        if "{prompt}" not in self.frame:
            raise ConfigError(f"the frame {self.frame!r} has no {{prompt}} where the prompt goes.")

    def samples(self, prompt: Prompt) -> int:
        """Answers to a prompt."""
        of_kind = self.open_samples if prompt.kind == "open" else self.closed_samples
        return prompt.samples or of_kind


def draw_answers(
    checkpoint: str,
    prompts: list[Prompt],
    drawing: Drawing,
    path: Path,
    *,
    name: str | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Add what a checkpoint answers to a samples file, which is made where there is none.

    What the file has of it already is kept, so work that was interrupted goes on where it stopped.

    Args:
        checkpoint: a Hugging Face folder or Hub name.
        path: lines of other models may be in it.
        name: of the model in the file; None: `checkpoint`.

    Raises:
        ConfigError: there is no model; the file has lines of that name drawn in another way; the
            format is chat and the tokenizer has no chat template.
    """
    name = name or checkpoint.rstrip("/")
    model = open_asked_model(checkpoint, device=torch.device(drawing.device), dtype=drawing.dtype)
    how = _how(drawing, model)
    done = _settle(path, name, how)
    wanted = [
        prompt for prompt in prompts if not done.issuperset(_keys(prompt, drawing.samples(prompt)))
    ]
    if len(wanted) < len(prompts):
        tell(f"{path} has {name}'s answers to {len(prompts) - len(wanted)} prompts already.")

    thinker = _thinker(model, drawing, how["weights"])
    for prompt, replies in _answers(thinker, wanted, drawing, model.tokenizer):
        lines = [
            _line(name, prompt, number, reply, how)
            for number, reply in enumerate(replies)
            if (prompt.kind, prompt.text, number) not in done
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        append(path, text.encode(), point="diversity.torn_samples")


def _keys(prompt: Prompt, samples: int) -> set[tuple[str, str, int]]:
    return {(prompt.kind, prompt.text, number) for number in range(samples)}


def _how(drawing: Drawing, model: AskedModel) -> dict[str, object]:
    """What every line says of how it was drawn."""
    frame = drawing.frame if drawing.format == "raw" else "chat template"
    dtype = str(model.policy.head.dtype).removeprefix("torch.")
    how = {
        "seed": drawing.seed,
        "temperature": drawing.temperature,
        "top_p": drawing.top_p,
        "format": drawing.format,
        "frame": frame,
        "weights": digest_of_weights(model),
        "thinks": drawing.thinks,
        "dtype": dtype,
    }
    assert tuple(how) == DRAWN
    return how


def digest_of_weights(model: AskedModel) -> str:
    """Of all weights as they are held."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.policy.lm.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settle(path: Path, name: str, how: dict[str, object]) -> set[tuple[str, str, int]]:
    """Cut off the line that an interruption tore, and say which answers of a model are there."""
    if not path.exists():
        return set()
    content = read_bytes(path)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        cut(path, whole, point="diversity.torn_samples")
    done = set()
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        sample = json.loads(line)
        if sample["model"] != name:
            continue
        for key, value in how.items():
            if sample.get(key) != value:
                raise ConfigError(
                    f"{path}, line {number}: {name} was drawn with {key} {sample.get(key)!r}, and"
                    f" is asked for with {value!r}. Write another --samples file, or another name."
                )
        done.add((sample["kind"], sample["prompt"], sample["sample"]))
    return done


def _thinker(model: AskedModel, drawing: Drawing, weights: str) -> Thinker:
    key = hashlib.blake2b(f"{drawing.seed} {weights}".encode(), digest_size=8).digest()
    markers = model.thought_format.markers
    return Thinker(
        model.policy,
        open_sampler(SamplingConfig(slots=drawing.rows), model.policy, shared=False),
        model.tokenizer,
        model.thought_format,
        thinks=drawing.thinks,
        thought_tokens=drawing.thought_tokens or model.thought.max_thought_tokens,
        answer_temperature=max(drawing.temperature, GREEDY) if drawing.temperature else 0.0,
        answer_top_p=drawing.top_p,
        # A marker of several tokens begins with an ordinary one, such as "<".
        barred=markers.open if len(markers.open) == 1 else (),
        seed=int.from_bytes(key, "big"),
        rows=drawing.rows,
    )


def _answers(
    thinker: Thinker, prompts: list[Prompt], drawing: Drawing, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Prompt, list[Reply]]]:
    """Each prompt with its replies; those of equal budget and number are drawn together."""
    groups: dict[tuple[int, int], dict[str, list[Prompt]]] = defaultdict(dict)
    for prompt in prompts:
        key = (drawing.samples(prompt), prompt.tokens or drawing.tokens)
        text = written(prompt.text, drawing, tokenizer)
        groups[key].setdefault(text, []).append(prompt)
    again = drawing.frame.partition("{prompt}")[0].strip()
    until = [f"\n{again}"] if drawing.format == "raw" and again else []
    for (samples, budget), of_text in groups.items():
        asked = thinker.each_reply(list(of_text), samples, until=until, answer_tokens=budget)
        for text, replies in asked:
            for prompt in of_text[text]:
                yield prompt, replies


def written(prompt: str, drawing: Drawing, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the model reads it.

    Raises:
        ConfigError: the format is chat, and the tokenizer has no template for it.
    """
    if drawing.format == "raw":
        return drawing.frame.replace("{prompt}", prompt)
    if not tokenizer.chat_template:
        raise ConfigError(
            "the format chat needs the chat template of a tokenizer, and this one has none. Write"
            " --format raw."
        )
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # Some templates write the token that the tokenizer itself puts in front.
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if begins and tokenizer.bos_token else text


def _line(
    name: str, prompt: Prompt, number: int, reply: Reply, how: dict[str, object]
) -> dict[str, object]:
    line = {"model": name, "prompt": prompt.text, "kind": prompt.kind, "text": reply.answer}
    if prompt.answers:
        line["answer"] = list(prompt.answers)
    if prompt.category:
        line["category"] = prompt.category
    if reply.thought_tokens:
        line["thought"] = reply.thought
    ended = not reply.answer_truncated
    return line | {"sample": number, "ended": ended, "tokens_drawn": reply.answer_tokens} | how

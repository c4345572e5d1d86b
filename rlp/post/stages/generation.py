"""`generate`: documents of the newest model, real ones, or both: what the next one is trained on.

work/samples.jsonl      what was drawn, as `rlp diversity` writes it; continued where it stopped
work/dropped.jsonl      {"text", "reason"}: what a filter has left out
work/documents.jsonl    {"text"}: what is trained on; it is there once the stage is done

The stages behind it name the last one as `{NAME}/work/documents.jsonl`. A round of a generation
loop is such a stage and a `cpt` behind it, whose model the next round begins with; what tells arms
apart is how much is real, and what is filtered.

Documents are drawn without thoughts. They depend on the weights, the prompt, the seed and their
number, as answers of `rlp diversity` do.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlp.config import ConfigError, DataConfig, ModelConfig
from rlp.data.errors import DataError
from rlp.data.sources import open_rows
from rlp.measure.ledger import Ledger
from rlp.model.loading import read_model_config
from rlp.model.shapes import model_shapes, row_work
from rlp.post.diversity_drawing import Drawing, draw_answers
from rlp.post.diversity_samples import read_prompts
from rlp.post.pipeline_config import GenerateStage
from rlp.post.stages.costs import spent_of
from rlp.post.stages.interface import Made, StageError, Work
from rlp.process.files import write_atomically
from rlp.process.outside import open_part
from rlp.process.run_logs import read_json_lines

Filter = Callable[[list[str]], list[str]]
"""Documents, all that were drawn in the stage -> for each the reason why it is left out, empty
where it is kept."""


def generate(work: Work) -> Made:
    """Make the documents of a round; no model is made."""
    settings: GenerateStage = work.settings
    path = work.folder / "documents.jsonl"
    samples = work.folder / "samples.jsonl"
    ledger = Ledger(model_shapes(read_model_config(ModelConfig(path=work.model))))
    if settings.num_own:
        with ledger.time("decode"):
            _draw(work, samples)
        _count(ledger, settings, samples, work.model)
    ledger.close_step(work.ranks)

    if not path.exists():
        own = _kept(work, _drawn(samples, settings.separator)) if settings.num_own else []
        texts = [*own, *real_documents(settings)]
        work.tell(f"{len(texts)} documents, {len(own)} of them of the model")
        _write_rows(path, ({"text": text} for text in texts))
    spent = spent_of(ledger.to_json())
    return Made(spent=replace(spent, optimizer_steps=0))


def refuse_bad_generation(settings: GenerateStage) -> None:
    """What can be seen before the stage begins.

    Raises:
        ConfigError, DataError: prompts that are none, or a filter that can not be imported.
    """
    if settings.prompts:
        read_prompts(Path(settings.prompts))
    if settings.filter:
        open_part("filter", settings.filter, {}, ())


def real_documents(settings: GenerateStage) -> list[str]:
    """The first rows of the data, as many as the stage takes of them.

    Raises:
        DataError, ConfigError: there are fewer, or a row has no text.
    """
    if not settings.num_real:
        return []
    rows = open_rows(settings.data, DataConfig(train=settings.data), "train", "data")
    if len(rows) < settings.num_real:
        raise ConfigError(
            f"data: {len(rows)} rows, and real_share {settings.real_share:g} of"
            f" {settings.documents} documents takes {settings.num_real}. Write more data, or a"
            " smaller share."
        )
    found = []
    for index in range(settings.num_real):
        text = rows.read(index).get("text")
        if not isinstance(text, str) or not text:
            raise DataError(f"{rows.where(index)}: a real document needs `text`, got {text!r}.")
        found.append(text)
    return found


# Drawing


def parts(settings: GenerateStage, prompts: int) -> int:
    """Own documents that begin with each prompt, at most: all are wanted together."""
    return -(-settings.num_own // prompts)


def _draw(work: Work, samples: Path) -> None:
    settings: GenerateStage = work.settings
    prompts = read_prompts(Path(settings.prompts))
    each = parts(settings, len(prompts)) * settings.draws
    drawing = Drawing(
        open_samples=each,
        closed_samples=each,
        temperature=settings.temperature,
        top_p=settings.top_p,
        frame="{prompt}",
        tokens=settings.tokens,
        seed=work.seed,
        rows=ROWS,
        device=work.ranks.device.type,
    )
    draw_answers(work.model, prompts, drawing, samples, name="model", tell=work.tell)


ROWS = 256
"""Documents that are drawn side by side."""


def _drawn(samples: Path, separator: str) -> list[tuple[str, str]]:
    """Prompt, and document that begins with it: the first of each prompt, then the second of each,
    and so on."""
    lines = sorted(read_json_lines(samples), key=lambda line: (line["sample"], line["prompt"]))
    return [(line["prompt"], line["prompt"] + separator + line["text"]) for line in lines]


def _kept(work: Work, drawn: list[tuple[str, str]]) -> list[str]:
    """The documents that are taken: of each prompt its part, the first ones that the filter does
    not leave out.

    Raises:
        StageError: the filter leaves nothing.
    """
    settings: GenerateStage = work.settings
    texts = [text for _, text in drawn]
    reasons = _reasons(settings.filter, texts) if settings.filter else [""] * len(texts)
    if settings.filter:
        _write_dropped(work, [pair for pair in zip(texts, reasons) if pair[1]], len(texts))
    part = parts(settings, len({prompt for prompt, _ in drawn}))
    kept, taken = [], Counter()
    for (prompt, text), reason in zip(drawn, reasons):
        if not reason and taken[prompt] < part:
            taken[prompt] += 1
            kept.append(text)
    if not kept:
        raise StageError(
            f"filter: {settings.filter} has left none of {len(texts)} documents. Write a greater"
            " draws, or another filter."
        )
    return kept[: settings.num_own]


def _write_dropped(work: Work, dropped: list[tuple[str, str]], drawn: int) -> None:
    rows = ({"text": text, "reason": reason} for text, reason in dropped)
    _write_rows(work.folder / "dropped.jsonl", rows)
    counts = Counter(reason for _, reason in dropped)
    said = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    work.tell(f"drawn {drawn}, dropped {len(dropped)}{said and ': '}{said}")


def _reasons(name: str, texts: list[str]) -> list[str]:
    part = open_part("filter", name, {}, ())
    reasons = part(texts)
    if not isinstance(reasons, list) or len(reasons) != len(texts):
        came = f"{len(reasons)}" if isinstance(reasons, list) else type(reasons).__name__
        raise part.refuse(came, f"a list of {len(texts)} texts, one for each document")
    return reasons


def _count(ledger: Ledger, settings: GenerateStage, samples: Path, model: str) -> None:
    """Prompts read, documents drawn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = read_json_lines(samples)
    drawn = np.array([line["tokens_drawn"] for line in lines])
    length = {prompt: len(tokenizer(prompt).input_ids) for prompt in {x["prompt"] for x in lines}}
    before = np.array([length[line["prompt"]] for line in lines])
    read, generated = sum(length.values()), int(drawn.sum())
    work = row_work(np.array(list(length.values())), head_rows=len(length))
    ledger.add("prefill", work, passes=1, tokens_in=read)
    work = row_work(drawn, head_rows=generated, before=before)
    ledger.add("decode", work, passes=1, tokens_generated=generated)
    ledger.add_documents(read)
    ledger.add_thoughts(len(lines), max_thought_tokens=settings.tokens, sampled_tokens=generated)


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode(), point="generate.torn_documents")

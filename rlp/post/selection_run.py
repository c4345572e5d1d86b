"""The command `rlp select`: a corpus on disk, scored under a proxy and selected from, in passes
that hold none of it.

    1  each row is read: what is no document, what a benchmark's file has too, and what was nearly
       there before is out, as that costs least
    2  gradients of what is left are projected and added to a file, a chunk at a time
    3  that file is measured and clustered; each row is written with what became of it

Memory grows by some 60 bytes a row. What is larger is in the folder `OUT.selecting`, mapped from
disk, so that the system takes the pages back when it needs them; a selection that was stopped goes
on from there: it begins the first pass anew, and adds to the gradients. At the end it is gone.

Dimensions
    n  rows;  m  those with a gradient;  d  coordinates of a feature
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from rlp.compare.asked_model import AskedModel, open_asked_model
from rlp.config import ConfigError, DataConfig
from rlp.data.documents import Document
from rlp.data.errors import BadDocument
from rlp.data.sources import Rows, open_rows
from rlp.post.diversity_drawing import digest_of_weights
from rlp.post.selection import (
    Clusters,
    default_clusters,
    g_vendi,
    gradient_features,
    sparse_clusters,
)
from rlp.post.selection_documents import FOREIGN, SHORT, Templates, document_of
from rlp.post.selection_overlap import (
    SAMPLE,
    benchmark_runs,
    is_duplicate,
    run_checksums,
    sample_of,
    seen_before,
)
from rlp.process.files import (
    append,
    give_name,
    new_file,
    new_folder,
    read_bytes,
    refuse_existing,
    remove,
    write_new,
)
from rlp.process.json_files import json_bytes
from rlp.process.progress import Progress

CHUNK = 256
"""Rows that are read, and documents whose gradients are added, together."""

CONTAMINATED, DUPLICATE, NO_GRADIENT = "contaminated", "near-duplicate", "no gradient"
DENSE, BEYOND = "dense", "beyond the most asked for"

EXAMPLES, EXAMPLE_CHARACTERS = 3, 160
"""Of a cluster, for who reads the JSON."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """What the gradients depend on: two selections that agree in it have the same."""

    corpus: str
    proxy: str
    templates: Templates = field(default_factory=Templates)
    dimensions: int = 1024
    seed: int = 0
    most_tokens: int = 1024
    tokens_per_batch: int = 1024
    same_share: float = 0.5
    """Of its runs of words, from which a document is one that was there before."""
    benchmarks: tuple[Path, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        least = {"dimensions": 1, "seed": 0, "most_tokens": 2, "tokens_per_batch": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} must be at least {value}, got {getattr(self, name)}.")
        if not 0 < self.same_share <= 1:
            raise ConfigError(f"--same must be above 0 and at most 1, got {self.same_share:g}.")


@dataclass(frozen=True, slots=True)
class Choosing:
    """Which of the scored documents are kept, and where it is written."""

    out: Path
    keep: Fraction
    clusters: int | None = None
    most: int | None = None
    """Documents at most."""
    json: Path | None = None
    kept: Path | None = None
    """Kept rows alone, as the corpus has them."""
    under: str | None = None
    """Field of a row that gets what is said of it; None: the row itself."""

    def __post_init__(self) -> None:
        paths = {"--out": self.out, "--json": self.json, "--kept": self.kept}
        named: dict[Path, str] = {}
        for option, path in paths.items():
            if path is None:
                continue
            if (first := named.setdefault(path.absolute(), option)) != option:
                raise ConfigError(
                    f"{first} and {option} both name {path}, and one would write over the other."
                    " Write two names."
                )


class Corpus:
    """Rows, and why some of them are out."""

    def __init__(self, source: str) -> None:
        config = DataConfig(train=[source])
        self.rows: Rows = open_rows([source], config, "train", "CORPUS")
        self.reasons = [""]
        self.reason = np.zeros(len(self.rows), dtype=np.uint8)
        """[n], index into `reasons`; 0: none so far."""

    def drop(self, index: int, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.reason[index] = self.reasons.index(reason)

    @property
    def left(self) -> np.ndarray:
        """[m] rows that nothing has dropped."""
        return np.flatnonzero(self.reason == 0)


def select(scoring: Scoring, choosing: Choosing) -> dict:
    """Select from a corpus; what the JSON says.

    Raises:
        ConfigError, DataError: something that is named is not there or can not be used, or no
            document is left.
    """
    folder = choosing.out.with_name(f"{choosing.out.name}.selecting")
    finals = {"rows.jsonl": choosing.out, "selection.json": choosing.json, "kept": choosing.kept}
    if (folder / "done").exists():
        told = json.loads(read_bytes(folder / "selection.json"))
        _name(folder, finals)
        return told
    for option, path in (
        ("--out", choosing.out),
        ("--json", choosing.json),
        ("--kept", choosing.kept),
    ):
        if path is not None:
            refuse_existing(path, option)

    corpus = Corpus(scoring.corpus)
    model = open_asked_model(
        scoring.proxy, device=torch.device(scoring.device), dtype=scoring.dtype
    )
    if not model.tokenizer.is_fast:
        raise ConfigError("the proxy's tokenizer does not say where in a text its tokens stand.")
    _begin(folder, _identity(scoring, corpus, model))
    _look(corpus, scoring, folder)
    features = _score(corpus, scoring, model, folder)
    found = _clusters(features, choosing)
    told = _told(scoring, choosing, corpus, features, found, model)
    _write(folder, corpus, scoring, choosing, found, told)
    _name(folder, finals)
    return told


# Where it stands


def _identity(scoring: Scoring, corpus: Corpus, model: AskedModel) -> dict[str, object]:
    """What has to be the same for the gradients of a selection that was stopped to be of use."""
    templates = scoring.templates
    return {
        "corpus": [table.identity for table in corpus.rows.tables],
        "proxy": digest_of_weights(model),
        "template": [templates.text, templates.prompt, templates.completion],
        "dimensions": scoring.dimensions,
        "seed": scoring.seed,
        "most_tokens": scoring.most_tokens,
        "tokens_per_batch": scoring.tokens_per_batch,
        "same_share": scoring.same_share,
        "benchmarks": [str(path) for path in scoring.benchmarks],
        "dtype": scoring.dtype,
        "chunk": CHUNK,
    }


def _begin(folder: Path, identity: dict[str, object]) -> None:
    """Make the folder of a selection, or find it as it was left."""
    if not folder.exists():
        with new_folder(folder, point="select.before_folder") as new:
            content = json_bytes(identity, "identity.json")
            write_new(new / "identity.json", content, point="select.torn_identity")
        return
    began = json.loads(read_bytes(folder / "identity.json"))
    other = [name for name, value in identity.items() if began.get(name) != value]
    if other:
        raise ConfigError(
            f"{folder} is of a selection that was begun with another {other[0]}"
            f" ({began.get(other[0])!r:.80}, now {identity[other[0]]!r:.80}). Go on with that one,"
            " remove the folder, or write another --out."
        )


def _name(folder: Path, finals: dict[str, Path | None]) -> None:
    """Give what is written its name, and remove the rest."""
    for made, final in finals.items():
        if final is not None and (folder / made).exists():
            give_name(folder / made, final)
    remove(folder)


# 1: what costs least


def _look(corpus: Corpus, scoring: Scoring, folder: Path) -> None:
    """Read every row; drop what is no document, is a benchmark's, or was nearly there before."""
    runs = benchmark_runs(scoring.benchmarks)
    path = folder / "samples"
    remove(path)
    with (
        Progress("reading", len(corpus.rows), "rows") as progress,
        new_file(path, point="select.torn_samples") as file,
    ):
        for index in range(len(corpus.rows)):
            file.write(_looked_at(corpus, index, scoring.templates, runs).tobytes())
            progress.advance()
    samples = np.memmap(path, dtype=np.uint64, mode="r", shape=(len(corpus.rows), SAMPLE))
    for index in np.flatnonzero(is_duplicate(seen_before(samples), scoring.same_share)):
        corpus.drop(index, DUPLICATE)
    del samples
    remove(path)
    if not len(corpus.left):
        raise ConfigError(f"no document of {scoring.corpus} is left: {_counts(corpus)}.")


def _looked_at(
    corpus: Corpus, index: int, templates: Templates, benchmark: frozenset[int]
) -> np.ndarray:
    """[SAMPLE] checksums that stand for a row; none of one that is dropped."""
    try:
        own = run_checksums("".join(templates.fill(corpus.rows.read(index))))
    except BadDocument as error:
        corpus.drop(index, error.args[0])
        return sample_of(np.zeros(0, dtype=np.uint64))
    if benchmark and not benchmark.isdisjoint(own.tolist()):
        corpus.drop(index, CONTAMINATED)
        return sample_of(own[:0])
    return sample_of(own)


def _counts(corpus: Corpus) -> str:
    counts = Counter(corpus.reasons[code] for code in corpus.reason.tolist() if code)
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())


# 2: gradients

CODES = ("", SHORT, FOREIGN, NO_GRADIENT)
"""What the second pass says of a document, by the byte that it writes."""


def _score(corpus: Corpus, scoring: Scoring, model: AskedModel, folder: Path) -> np.ndarray:
    """[m, d], mapped from disk: features of the rows that are left, chunk by chunk."""
    rows, codes_path, path = corpus.left, folder / "codes", folder / "features"
    codes = np.frombuffer(read_bytes(codes_path) if codes_path.exists() else b"", dtype=np.uint8)
    if len(codes) < len(rows):
        codes = codes[: len(codes) // CHUNK * CHUNK]  # so that batches are the same ones
    with Progress("gradients", len(rows), "documents") as progress:
        progress.advance(len(codes))
        for start in range(len(codes), len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            found, features = _features(corpus, chunk, scoring, model)
            size = int((codes == 0).sum()) * scoring.dimensions * 4
            append(path, features.tobytes(), point="select.torn_features", size=size)
            append(codes_path, found.tobytes(), point="select.torn_codes", size=len(codes))
            codes = np.concatenate([codes, found])
            progress.advance(len(chunk))
    for place in np.flatnonzero(codes):
        corpus.drop(rows[place], CODES[codes[place]])
    if not len(corpus.left):
        raise ConfigError(
            f"no document of {scoring.corpus} has a gradient under {scoring.proxy}:"
            f" {_counts(corpus)}."
        )
    shape = (int((codes == 0).sum()), scoring.dimensions)
    return np.memmap(path, dtype=np.float32, mode="r", shape=shape)


def _features(
    corpus: Corpus, rows: np.ndarray, scoring: Scoring, model: AskedModel
) -> tuple[np.ndarray, np.ndarray]:
    """(codes [rows] uint8, features of those with code 0)."""
    codes, documents = np.zeros(len(rows), dtype=np.uint8), []
    for place, index in enumerate(rows):
        try:
            documents.append(_document(corpus, int(index), scoring, model))
        except BadDocument as error:
            codes[place] = CODES.index(error.args[0])
    features = gradient_features(
        model.policy.lm,
        documents,
        dimensions=scoring.dimensions,
        seed=scoring.seed,
        tokens_per_batch=scoring.tokens_per_batch,
    )
    there = np.isfinite(features).all(axis=1)
    codes[np.flatnonzero(codes == 0)[~there]] = CODES.index(NO_GRADIENT)
    return codes, features[there]


def _document(corpus: Corpus, index: int, scoring: Scoring, model: AskedModel) -> Document:
    prompt, completion = scoring.templates.fill(corpus.rows.read(index))
    return document_of(
        prompt,
        completion,
        model.tokenizer,
        most_tokens=scoring.most_tokens,
        vocabulary=model.policy.lm.get_input_embeddings().weight.shape[0],
    )


# 3: the choice


def _clusters(features: np.ndarray, choosing: Choosing) -> Clusters:
    count = len(features)
    wanted = choosing.clusters or default_clusters(count)
    if wanted > count:
        raise ConfigError(
            f"--clusters {wanted} of {count} documents with a gradient: write {count} or fewer."
        )
    with Progress("clustering", None, "rounds") as progress:
        return sparse_clusters(
            features, wanted, keep=choosing.keep, on_round=lambda changed: progress.advance()
        )


def _chosen(found: Clusters, most: int | None) -> np.ndarray:
    """[m] bool"""
    return found.kept if most is None else found.first(most)


def _told(
    scoring: Scoring,
    choosing: Choosing,
    corpus: Corpus,
    features: np.ndarray,
    found: Clusters,
    model: AskedModel,
) -> dict:
    """What the JSON says, but for the examples."""
    chosen = _chosen(found, choosing.most)
    dropped = Counter(corpus.reasons[code] for code in corpus.reason.tolist() if code)
    dropped[DENSE] = int((~found.kept).sum())
    dropped[BEYOND] = int((found.kept & ~chosen).sum())
    return {
        "documents": len(corpus.rows),
        "scored": len(features),
        "g_vendi": g_vendi(features),
        "g_vendi_kept": g_vendi(features, chosen),
        "clusters": len(found.size),
        "cluster_sizes": found.size.tolist(),
        "sparse": found.sparse.tolist(),
        "kept": int(chosen.sum()),
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "settings": {
            "corpus": scoring.corpus,
            "proxy": scoring.proxy,
            "keep": str(choosing.keep),
            "most": choosing.most,
            **_identity(scoring, corpus, model),
        },
    }


def _write(
    folder: Path,
    corpus: Corpus,
    scoring: Scoring,
    choosing: Choosing,
    found: Clusters,
    told: dict,
) -> None:
    """Every row with what became of it, the kept ones alone, and the JSON."""
    for name in ("rows.jsonl", "kept", "selection.json"):
        remove(folder / name)
    examples: dict[int, list[str]] = {}
    with (
        Progress("writing", len(corpus.rows), "rows") as progress,
        new_file(folder / "rows.jsonl", point="select.torn_rows") as out,
        new_file(folder / "kept", point="select.torn_kept") as kept,
    ):
        for row, verdict in _verdicts(corpus, found, choosing):
            out.write(_line(_marked(row, verdict, choosing.under)))
            if verdict["kept"]:
                kept.write(_line(row))
            if verdict["cluster"] is not None:
                own = examples.setdefault(verdict["cluster"], [])
                if len(own) < EXAMPLES:
                    own.append("".join(scoring.templates.fill(row))[:EXAMPLE_CHARACTERS])
            progress.advance()
    told["examples"] = [examples[cluster] for cluster in range(len(found.size))]
    content = json_bytes(told, "selection.json")
    write_new(folder / "selection.json", content, point="select.torn_json")
    write_new(folder / "done", b"", point="select.before_done")


def _verdicts(corpus: Corpus, found: Clusters, choosing: Choosing) -> Iterator[tuple[dict, dict]]:
    """(row, what is said of it), in the order of the corpus."""
    chosen, score = _chosen(found, choosing.most), found.score
    place = 0
    for index in range(len(corpus.rows)):
        row = _row(corpus, index)
        why = corpus.reasons[corpus.reason[index]]
        if why:
            yield row, {"cluster": None, "score": None, "kept": False, "why": why}
            continue
        why = None if chosen[place] else BEYOND if found.kept[place] else DENSE
        yield (
            row,
            {
                "cluster": int(found.label[place]),
                "score": round(float(score[place]), 6),
                "kept": bool(chosen[place]),
                "why": why,
            },
        )
        place += 1


def _row(corpus: Corpus, index: int) -> dict:
    """A row as it was read; of one that can not be read, where it stands."""
    try:
        return corpus.rows.read(index)
    except BadDocument as error:
        return {"where": corpus.rows.where(index), "problem": ": ".join(error.args)}


def _marked(row: dict, verdict: dict, under: str | None) -> dict:
    added = verdict if under is None else {under: verdict}
    if taken := [name for name in added if name in row]:
        raise ConfigError(
            f"rows of the corpus have a field {taken[0]!r} of their own, which the selection would"
            " write over. Write --under NAME, a field that gets what is said of a row."
        )
    return row | added


def _line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()

"""The command line of `rlp select`."""

import argparse
from pathlib import Path


def add_select(commands: argparse._SubParsersAction) -> None:
    """Its parser."""
    select = commands.add_parser(
        "select",
        help="keep documents whose gradients stand where few others do",
        epilog=(
            "A row of --out is one of the corpus with its cluster, its score (nats, the rarer the"
            " higher), whether it is kept, and why not. A selection that was stopped goes on from"
            " the folder OUT.selecting."
        ),
    )
    select.add_argument(
        "corpus",
        metavar="CORPUS",
        help="rows with text, or with prompt and completion: .jsonl, ...",
    )
    select.add_argument(
        "--proxy",
        required=True,
        metavar="CHECKPOINT",
        help="whose gradients: a Hugging Face folder, a run folder (its export), or a Hub name",
    )
    select.add_argument(
        "--keep",
        default="0.5",
        metavar="X",
        help="share of the clusters, the smallest first, those of equal size together (0.5)",
    )
    select.add_argument(
        "--most", type=int, metavar="N", help="documents that are kept (any number)"
    )
    select.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="to make: every row, and why it is not kept",
    )
    select.add_argument(
        "--kept", type=Path, metavar="FILE", help="to make: the kept rows alone, as they were"
    )
    select.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    _add_reading(select)
    _add_scoring(select)
    select.set_defaults(command=_select)


def _add_reading(select: argparse.ArgumentParser) -> None:
    """How a row is read, and what is no candidate."""
    select.add_argument("--template", metavar="TEXT", help="a text, such as '{title} {body}'")
    select.add_argument("--prompt", metavar="TEXT", help="before a completion, as a template")
    select.add_argument(
        "--completion", metavar="TEXT", help="what is predicted alone, as a template ('{answer}')"
    )
    select.add_argument(
        "--decontaminate",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="drop documents that have ten words in a row with one of its rows",
    )
    select.add_argument(
        "--same",
        type=float,
        default=0.5,
        metavar="X",
        help="share of runs of ten words that makes a near-duplicate of earlier ones (0.5)",
    )
    select.add_argument(
        "--under", metavar="NAME", help="put what is said of a row in a field of its own"
    )


def _add_scoring(select: argparse.ArgumentParser) -> None:
    select.add_argument(
        "--clusters", type=int, metavar="K", help="of k-means (1 %% of the documents, 16 to 4096)"
    )
    for name, default, what in (
        ("--dimensions", 1024, "of a projected gradient"),
        ("--seed", 0, "of the projection"),
        ("--most-tokens", 1024, "of a document that are read"),
        ("--tokens-per-batch", 1024, "that go through the proxy together"),
    ):
        select.add_argument(
            name, type=int, default=default, metavar="N", help=f"{what} ({default})"
        )
    select.add_argument("--device", default="auto", help="auto, cpu, cuda")
    select.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="float32", help="(float32)"
    )


def _select(arguments: argparse.Namespace) -> int:
    from rlp.compare.evaluate import device_of, model_of
    from rlp.config import ConfigError
    from rlp.post.selection import keep_share
    from rlp.post.selection_documents import Templates
    from rlp.post.selection_run import Choosing, Scoring, select

    for option in ("most", "clusters"):
        count = getattr(arguments, option)
        if count is not None and count < 1:
            raise ConfigError(f"--{option} must be at least 1, got {count}.")
    scoring = Scoring(
        corpus=arguments.corpus,
        proxy=model_of(arguments.proxy),
        templates=Templates(arguments.template, arguments.prompt, arguments.completion),
        dimensions=arguments.dimensions,
        seed=arguments.seed,
        most_tokens=arguments.most_tokens,
        tokens_per_batch=arguments.tokens_per_batch,
        same_share=arguments.same,
        benchmarks=tuple(arguments.decontaminate),
        device=str(device_of(arguments.device)),
        dtype=arguments.dtype,
    )
    choosing = Choosing(
        out=arguments.out,
        keep=keep_share(arguments.keep),
        clusters=arguments.clusters,
        most=arguments.most,
        json=arguments.json,
        kept=arguments.kept,
        under=arguments.under,
    )
    print(_in_words(arguments.out, select(scoring, choosing)))
    return 0


def _in_words(out: Path, told: dict) -> str:
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in told["dropped"].items())
    return (
        f"{out}: {told['kept']:,} of {told['documents']:,} documents kept, dropped"
        f" ({dropped or 'none'}); G-Vendi {told['g_vendi']:.1f} of the {told['scored']:,} scored,"
        f" {told['g_vendi_kept']:.1f} of the kept; {told['clusters']} clusters"
    )

"""One page about a selection: what became of the documents, and its clusters with examples."""

import json
from pathlib import Path

from markupsafe import Markup

from rlp.config import ConfigError
from rlp.measure.report import GENERATOR, page_template
from rlp.process.files import read_bytes, write_atomically

SHOWN = 40
"""Clusters at each end; between them a page would hold thousands."""

_PARTS = ("documents", "scored", "kept", "dropped", "g_vendi", "g_vendi_kept", "settings")
_BY_CLUSTER = ("cluster_sizes", "sparse", "examples")


def is_selection(path: Path) -> bool:
    """Whether a path may be what `rlp select --json` wrote: a file."""
    return path.is_file() and path.suffix == ".json"


def write_selection_report(path: Path, out: Path) -> None:
    """Write the page about a selection, over whatever is at `out`.

    Raises:
        ConfigError: the file is no JSON of a selection.
    """
    try:
        told = json.loads(read_bytes(path))
        page = _render(path.name, told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not what `rlp select --json` writes: {type(error).__name__}: {error}."
        ) from error
    write_atomically(out, page.encode(), point="report.torn_page")


def _render(title: str, told: dict) -> str:
    for name in (*_PARTS, *_BY_CLUSTER):
        if name not in told:
            raise KeyError(name)
    clusters = [
        {"number": number, "size": size, "sparse": sparse, "examples": examples}
        for number, (size, sparse, examples) in enumerate(
            zip(*(told[name] for name in _BY_CLUSTER), strict=True)
        )
    ]
    clusters.sort(key=lambda one: (one["size"], one["number"]))
    left_out = max(0, len(clusters) - 2 * SHOWN)
    note = "The smallest first; a cluster is kept where it is sparse."
    if left_out:
        clusters = clusters[:SHOWN] + clusters[-SHOWN:]
        note += f" {left_out} between the smallest and the largest are left out."
    return page_template(Path(__file__).parent / "selection_report.html.j2").render(
        generator=Markup(GENERATOR),
        title=title,
        main_plots=[],
        facts=_facts(told),
        dropped=sorted(told["dropped"].items(), key=lambda one: -one[1]),
        clusters=clusters,
        note=note,
    )


def _facts(told: dict) -> list[tuple[str, str]]:
    settings = told["settings"]
    return [
        ("Corpus", str(settings["corpus"])),
        ("Proxy", str(settings["proxy"])),
        ("Documents", f"{told['documents']:,}, of which {told['scored']:,} have a gradient"),
        ("Kept", f"{told['kept']:,}"),
        ("G-Vendi of those scored", f"{told['g_vendi']:.1f}"),
        ("G-Vendi of those kept", f"{told['g_vendi_kept']:.1f}"),
    ]

"""Pages with parts that are made from results: tables, claims, counts.

A part stands between `<!-- made NAME -->` and `<!-- end -->`, each alone on its line, and is made
again whenever the results change; what stands around it is written by hand.
"""

from collections.abc import Mapping, Sequence

_END = "<!-- end -->"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells, without a newline at its end.

    Raises:
        ValueError: a row has more or fewer cells than there are titles.
    """
    for number, row in enumerate(rows, start=1):
        if len(row) != len(titles):
            raise ValueError(f"row {number} has {len(row)} cells under {len(titles)} titles.")
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill_page(page: str, parts: Mapping[str, str]) -> str:
    """The page with these parts in their places; its other parts stay as they are.

    Raises:
        ValueError: a part has no place, or two.
    """
    for name, text in parts.items():
        start = f"<!-- made {name} -->\n"
        before, found, behind = page.partition(start)
        end = behind.find(_END)
        if not found or end < 0 or start in behind or "<!-- made " in behind[:end]:
            raise ValueError(
                f"the page needs one place for {name!r}: the two lines {start.strip()} and {_END}."
            )
        page = f"{before}{start}{text}\n{behind[end:]}"
    return page

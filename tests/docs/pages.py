"""The pages of the documentation: their fenced blocks, links and anchors.

A block in one of `RUN` is run by the tests, in the order of its page. Where it can not be, an HTML
comment on the lines before its fence says why, in one of two forms:

    <!-- not run: REASON -->
    <!-- run as COMMAND: REASON -->

The first line of a block may be the comment `# NAME.py` or `# NAME.yaml`: it is that file.
"""

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/*.md"),
    ]
)

RUN = ("sh", "python", "yaml")
SHOWN = ("text", "bibtex", "json", "{toctree}")
"""Languages of blocks that show something, and are no input to anything."""

FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- ((?:(?!-->).)*) -->\s*\Z", flags=re.DOTALL)
NOT_RUN = re.compile(r"not run: (?P<reason>\S.*)", flags=re.DOTALL)
RUN_AS = re.compile(r"run as (?P<instead>\S.*?): (?P<reason>\S.*)", flags=re.DOTALL)
FILE = re.compile(r"\A# (\w+\.(?:py|yaml))\n")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    """Why it is not run, or not as it stands."""
    instead: str = ""
    """The command that is run in its place."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """The name of the file that the block is; empty where it is none."""
        named = FILE.match(self.text)
        return named[1] if named else ""

    @property
    def is_run(self) -> bool:
        return self.language in RUN and (not self.reason or bool(self.instead))


def read_blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    blocks = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()]
        line = before.count("\n") + 1
        mark = MARK.search(before)
        said = mark[1] if mark else ""
        found = NOT_RUN.fullmatch(said) or RUN_AS.fullmatch(said)
        marked = found.groupdict() if found else {}
        blocks.append(Block(page, line, fence[1], fence[2], **marked))
    return blocks


def blocks_of(page: str) -> list[Block]:
    return read_blocks(page, (REPOSITORY / page).read_text())


def without_code(text: str) -> str:
    """A page without its blocks, its code in lines and its comments, which hold no links."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links_of(text: str) -> list[str]:
    """Where the links and pictures of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors_of(text: str) -> set[str]:
    """The names by which the headings of a page can be linked to."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", text), flags=re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    return found


def broken_links(page: str) -> list[str]:
    """Links of a page to files or headings that do not exist; addresses are not asked for."""
    path = REPOSITORY / page
    text, broken = path.read_text(), []
    for link in links_of(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        inside = target.is_relative_to(REPOSITORY) and target.exists()
        if not inside or (anchor and anchor not in anchors_of(target.read_text())):
            broken.append(link)
    return broken

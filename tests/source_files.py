"""The files of the program, by name."""

import ast
from pathlib import Path

from tests import REPOSITORY

MODULES = {
    ".".join(path.relative_to(REPOSITORY / "rlp").with_suffix("").parts): path
    for path in sorted((REPOSITORY / "rlp").rglob("*.py"))
}
"""Source files by their name below `rlp`."""
PROGRAM = [
    *MODULES.values(),
    *sorted((REPOSITORY / "kernels").rglob("*.py")),
    REPOSITORY / "train.py",
]

PYTHON = [
    *PROGRAM,
    *sorted((REPOSITORY / "tests").rglob("*.py")),
    *sorted((REPOSITORY / "experiments").rglob("*.py")),
]
"""All that is written in Python here."""

SETTINGS = [
    *sorted((REPOSITORY / "configs").glob("*.yaml")),
    REPOSITORY / "pyproject.toml",
    REPOSITORY / "constraints.txt",
    REPOSITORY / "Makefile",
    REPOSITORY / ".ci" / "run",
]

_MADE = [
    REPOSITORY / "experiments" / "world" / name
    for name in ("data", "headings", "seeds", "heading_seeds")
]


def is_made(path: Path) -> bool:
    """Whether a command has written a file, which holds paths of this machine and is no part of the
    repository."""
    return any(folder in path.parents for folder in _MADE)


PAGES = [
    path
    for folder in (REPOSITORY, *(REPOSITORY / name for name in ("docs", "experiments", "kernels")))
    for path in sorted(folder.glob("*.md") if folder == REPOSITORY else folder.rglob("*.md"))
    if not is_made(path)
]


def name_of(path: Path) -> str:
    """Below the repository."""
    return str(path.relative_to(REPOSITORY))


def imports(source: str) -> set[str]:
    """Full names of all that a source imports, at any depth: `from rlp.data.stream import Source`
    gives rlp.data.stream and rlp.data.stream.Source. A relative import, which nobody writes here,
    gives `.` and its name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            names |= {home} | {f"{home}.{alias.name}" for alias in node.names}
    return names

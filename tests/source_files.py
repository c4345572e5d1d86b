"""The files of the program, by name."""

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

PAGES = [
    path
    for folder in (REPOSITORY, *(REPOSITORY / name for name in ("docs", "experiments", "kernels")))
    for path in sorted(folder.glob("*.md") if folder == REPOSITORY else folder.rglob("*.md"))
]


def name_of(path: Path) -> str:
    """Below the repository."""
    return str(path.relative_to(REPOSITORY))

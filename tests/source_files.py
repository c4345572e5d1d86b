"""The files of the program, by name."""

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

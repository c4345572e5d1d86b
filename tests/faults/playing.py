"""A case played with the harness, and damage to a checkpoint."""

import shutil
from pathlib import Path

from tests.faults.harness import Case, Harness, Outcome


def played(harness: Harness, case: Case, name: str) -> Outcome:
    outcome = harness.play(case, "".join(letter if letter.isalnum() else "_" for letter in name))
    assert outcome.problems == [], f"{case}\n" + "\n".join(outcome.problems)
    return outcome


def damage(folder: Path, kind: str) -> None:
    """One way for a checkpoint to be bad."""
    part, meta = min(folder.glob("shard_*")), folder / "meta.json"
    content = part.read_bytes()
    flipped = bytes([content[len(content) // 2] ^ 1])
    writes = {
        "a flipped bit": lambda: part.write_bytes(
            content[: len(content) // 2] + flipped + content[len(content) // 2 + 1 :]
        ),
        "a truncated part": lambda: part.write_bytes(content[:-7]),
        "an empty part": lambda: part.write_bytes(b""),
        "a deleted part": part.unlink,
        "a changed meta.json": lambda: meta.write_text(
            meta.read_text().replace('"step"', '"stop"', 1)
        ),
        "an empty meta.json": lambda: meta.write_bytes(b""),
        "a deleted COMPLETE": (folder / "COMPLETE").unlink,
        "a COMPLETE that is no text": lambda: (folder / "COMPLETE").write_bytes(b"\xff\xfe"),
        "an empty folder": lambda: (shutil.rmtree(folder), folder.mkdir()),
    }
    writes[kind]()

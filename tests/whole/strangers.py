"""What a stranger may have written, and whether it is harmless where it is shown."""

import re

BASE = {
    "run": {"dir": "runs/x"},
    "model": {"path": "somewhere"},
    "data": {"train": ["x.jsonl"]},
    "budget": {"steps": 1},
}
"""A config whose values are replaced one by one."""

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"
"""They clear a screen, name a window, color, and turn the direction of writing."""


def harmless(text: str) -> bool:
    """No control character but tab and newline, no mark that turns the direction of writing."""
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)

"""Checks that a worker of `AnswerPool` runs in a test: importable by name, without torch."""

import os
import time


def hangs_on_three(answer: str, reference: str) -> bool:
    """Never comes back from the answer 3."""
    if answer == "3":
        time.sleep(600)
    return answer == reference


def dies_on_three(answer: str, reference: str) -> bool:
    """The answer 3 ends the process."""
    if answer == "3":
        os._exit(9)
    return answer == reference

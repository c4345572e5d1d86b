"""Text for people: what they read is what there is, and it does nothing to their terminal."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

from tqdm import tqdm


def visible_text(text: str) -> str:
    """Text with its control characters spelled out (`\\x1b`), all but line ends and tabs.

    Terminal escapes, invisible characters, reversals of the writing direction and unpaired
    surrogates do nothing this way, and can still be seen.
    """
    return "".join(map(_visible, text))


def quoted_text(text: str) -> str:
    """Text in quotes on one line, white space to be seen: `"\\n"`, `" four"`. A single space is
    itself; any other is spelled out."""
    return f'"{"".join(map(_quoted, text))}"'


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t"
    return _spelled(character) if hidden else character


def _quoted(character: str) -> str:
    white = character.isspace() and character != " "
    return _spelled(character) if white or character == "\\" else _visible(character)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say_line(text: str, file: TextIO | None = None) -> None:
    """Print a line above any bar (by default to stdout). What data or a model wrote in it does
    nothing to the terminal."""
    try:
        tqdm.write(visible_text(text), file=file)
        (file or sys.stdout).flush()
    except OSError:
        # The output goes to a full disk, or nobody reads it any more: nobody is left to be told,
        # and work goes on.
        pass


@contextmanager
def printed_to(log: TextIO) -> Iterator[None]:
    """All that is printed goes to a file: what Python prints, what libraries write past it (a
    compiler, the C++ of torch), and what processes print that are started meanwhile."""
    with ExitStack() as stack:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            before = os.dup(number)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, number)
            os.dup2(log.fileno(), number)
        stack.callback(log.flush)
        with redirect_stdout(log), redirect_stderr(log):
            yield


def format_duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 48 s, 3:20 (minutes), 1:02:05 (hours), 3 d 04:10 (days and
    hours)."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"

    minutes, hours, days = whole // 60 % 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24:02d}:{minutes:02d}"
    clock = f"{minutes:02d}:{whole % 60:02d}"
    return f"{hours}:{clock}" if hours else clock.removeprefix("0")


def format_bytes(num_bytes: float) -> str:
    """Bytes as people say them, in powers of ten: 812 MB, 6.1 GB."""
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * unit_bytes:
            return f"{num_bytes / unit_bytes:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"

"""How a program begins and ends: its streams take any text, and what ends it, such as Ctrl-C or a
closed pipe, has an exit code of its own.

Standard library only: it is there before anything that takes seconds to import.
"""

import io
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from rlp.process.exit_codes import INTERRUPTED, PIPE_CLOSED


def accept_any_text() -> None:
    """From here on no print fails for a character that the terminal's encoding lacks: it is shown
    as an escape (`\\u4e2d`).

    Every print, progress bar and table of this process goes through these two streams.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_command(command: Callable[[], int]) -> int:
    """The exit code of a command, which Ctrl-C and the end of a pipe (`rlp view RUN | head`) end
    without a traceback.

    Args:
        command: imports what it needs, so that the wait for imports can be interrupted as well.
    """
    accept_any_text()
    try:
        code = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # Python flushes once more on its way out, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return code


def _nobody_reads() -> bool:
    """Whether it is standard output that was closed at its other end."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def run_as_process(main: Callable[[], int]) -> NoReturn:
    """Run a program and end the process with its exit code, whatever the other ranks do.

    Python's own way out runs the destructors of process groups, which wait for ranks that may be
    gone.
    """
    code = 1
    accept_any_text()
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

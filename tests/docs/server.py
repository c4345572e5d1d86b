"""Runs the commands of a page without starting Python for each: it has imported everything.

    python server.py SOCKET

A command comes from `command.py`, which stands in for `rlp`, `python`, `deepspeed` and `torchrun`:
its arguments, folder and environment as JSON, with its output streams. It is answered with the exit
code. A launcher starts one process here; the tests of the launchers start several.
"""

import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
    "matplotlib.figure",
    "rlp.cli",
    "rlp.trainer",
    "scipy.stats",
    "transformers.integrations.deepspeed",
    "transformers.models.qwen3.modeling_qwen3",
)

BASE = Path(__file__).parents[2] / "rlp" / "world" / "base"

LAUNCHERS = {"deepspeed": "--module", "torchrun": "-m"}
"""The option by which a launcher is given a module in place of a file."""


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(BASE)  # compiles a thousand expressions
    importlib.import_module("matplotlib.figure").Figure().savefig(io.BytesIO())  # reads the fonts
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what has ended
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                serve(client)
            client.close()


def serve(client: socket.socket) -> None:
    """Run one command in a process of its own, and answer with its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked, streams, _, _ = socket.recv_fds(client, 2**20, 2)
    job = json.loads(asked)
    worker = os.fork()
    if worker == 0:
        client.close()
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        os._exit(run(job["program"], job["arguments"]))
    _, status = os.waitpid(worker, 0)
    client.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run(program: str, arguments: list[str]) -> int:
    """The exit code of a program, which may also end this process by itself."""
    code = 0
    try:
        start(program, arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def start(program: str, arguments: list[str]) -> None:
    """What the program does with the arguments."""
    if program == "rlp":
        sys.argv = ["rlp", *arguments]
        sys.exit(importlib.import_module("rlp.__main__").main())
    as_module = arguments[:1] == ["-m"]
    if program in LAUNCHERS:
        options, arguments = split(arguments)
        as_module = LAUNCHERS[program] in options
    elif as_module:
        arguments = arguments[1:]
    sys.argv = arguments
    if as_module:
        sys.path.insert(0, "")
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A launcher's options, and the program that it starts with its arguments."""
    flags = {"--module", "-m", "--standalone"}
    position = 0
    while arguments[position].startswith("-"):
        alone = arguments[position] in flags or "=" in arguments[position]
        position += 1 if alone else 2
    return arguments[:position], arguments[position:]


if __name__ == "__main__":
    main()

"""A rank whose launcher has died ends with a word and a code, however early that was; a program
that nobody launched goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import rlp.process.launcher
from rlp.process.exit_codes import INTERRUPTED, PEER_LOST
from rlp.process.launcher import Launchers
from tests import REPOSITORY
from tests.training import TINY

LIMIT_S = 300.0
"""Nothing here takes longer, on a machine that does much else."""

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}

ENDED = ""
BASH, INIT, SSHD, WRAPPER = (
    "-bash",
    "/sbin/init splash",
    "sshd: user@notty",
    "bash wrapper.sh train.py",
)
RUNNER, NODE = (
    "/venv/bin/python /venv/bin/deepspeed --num_gpus 2 train.py",
    "/venv/bin/python -u -m deepspeed.launcher.launch --world_info=abc train.py",
)


@pytest.mark.parametrize(
    "environment, ancestors, missing, watched",
    [
        ({}, [BASH], None, 0),  # python train.py
        ({}, [INIT], None, 0),  # the same from nohup, or from systemd
        ({}, ["/usr/bin/python3 sweep.py", BASH], None, 0),  # from a script, which may end
        (
            TORCHRUN,
            ["/venv/bin/python3 /venv/bin/torchrun --nproc_per_node 2 train.py", BASH],
            None,
            1,
        ),
        (
            TORCHRUN,
            ["python -m torch.distributed.run --nproc_per_node 2 train.py"],
            None,
            1,
        ),  # as the first process of a container
        (TORCHRUN, [WRAPPER, "python /venv/bin/torchrun --no-python wrapper.sh"], None, 1),
        (TORCHRUN, ["python /venv/bin/accelerate launch train.py", BASH], None, 1),
        (TORCHRUN, ["python own_agent.py", BASH], None, 1),  # launches as torchrun does
        (TORCHRUN, [ENDED, "python sweep.py", BASH], "process 0", 1),  # not waited for yet
        (DEEPSPEED, [ENDED, RUNNER, BASH], "deepspeed.launcher.launch", 1),
        (TORCHRUN, [INIT], "torchrun", 0),
        (TORCHRUN, ["/usr/lib/systemd/systemd --user", INIT], "torchrun", 0),
        (TORCHRUN, [], "torchrun", 0),
        (DEEPSPEED, [NODE, RUNNER, BASH], None, 2),
        (DEEPSPEED, [WRAPPER, NODE, RUNNER, BASH], None, 2),
        (
            DEEPSPEED,
            [f"{NODE} --node_rank=1", "bash -c cd /home", SSHD],
            None,
            1,
        ),  # from another machine
        (DEEPSPEED, [NODE, INIT], "deepspeed", 1),  # died while its node launcher imported
        (DEEPSPEED, [INIT], "deepspeed.launcher.launch", 0),
    ],
)
def test_who_must_have_launched_a_rank_and_is_not_there(
    monkeypatch, environment, ancestors, missing, watched
):
    """By what it left in the environment, against the processes above; without its marks nobody is
    missed."""

    class Ancestor(psutil.Process):
        def __init__(self, words):
            super().__init__()
            self._words = words.split()

        def cmdline(self):
            return self._words

        def status(self):
            return psutil.STATUS_SLEEPING if self._words else psutil.STATUS_ZOMBIE

    above = [Ancestor(words) for words in ancestors]
    monkeypatch.setattr(psutil.Process, "parents", lambda process: above)
    found = Launchers(environment)
    assert (found.gone() or "").replace(str(os.getpid()), "0") == (missing or "") and len(
        found._watched
    ) == watched


LAUNCHED = """
import ctypes, json, os, subprocess, sys
# PR_SET_CHILD_SUBREAPER: a rank whose launcher dies becomes a child of this process,
# which waits for it.
ctypes.CDLL(None).prctl(36, 1)
answers = []
for number in map(int, sys.argv[2:]):
    command = [sys.executable, os.path.join(sys.argv[1], "torchrun")]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rank = int(launcher.stdout.readline())
    launcher.send_signal(number)
    launcher.wait()
    answers.append([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]), launcher.stdout.read()])
print(json.dumps(answers))
"""

RANK = """
from rlp.process.launcher import watch_from_the_start
watch_from_the_start()
import os, time
print(os.getpid(), flush=True)
time.sleep(3600)  # imports
"""


def test_a_rank_whose_launcher_dies_while_it_imports_ends(tmp_path):
    """By SIGKILL and SIGTERM: with a message, and a code of its own."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "torchrun").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, {str(tmp_path / 'rank.py')!r}],"
        " stderr=subprocess.STDOUT, start_new_session=True)\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LAUNCHED,
            str(tmp_path),
            str(int(signal.SIGKILL)),
            str(int(signal.SIGTERM)),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=os.environ | TORCHRUN | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    for code, said in json.loads(done.stdout):
        assert code == PEER_LOST
        assert (
            "error: the launcher (process " in said
            and ") ended before the run began. This rank ends too, and nothing was written." in said
        )


def test_a_program_goes_on_when_the_shell_that_started_it_has_ended(tmp_path):
    """As after `nohup python train.py &` and logout."""
    (tmp_path / "program.py").write_text(
        RANK.replace(
            "time.sleep(3600)",
            f"time.sleep(3 * {rlp.process.launcher.POLL_S})\nopen({str(tmp_path / 'done')!r}, 'x')",
        )
    )
    subprocess.run(
        ["sh", "-c", f"{sys.executable} {tmp_path / 'program.py'} >{tmp_path / 'log'} 2>&1 &"],
        check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    until(lambda: (tmp_path / "done").exists())
    assert "error" not in (tmp_path / "log").read_text()


def until(holds, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


WAITS_IN_AN_IMPORT = """
import pathlib, sys, time

class Waits:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            pathlib.Path({there!r}).touch()
            try:
                time.sleep({limit})
            except BaseException:
                pass

sys.meta_path.insert(0, Waits())
"""


def test_ctrl_c_during_the_imports_is_no_traceback_and_is_not_lost(tmp_path):
    """Where a library catches all that comes of an import that it tries."""
    there = tmp_path / "there"
    waits = WAITS_IN_AN_IMPORT.format(there=str(there), limit=LIMIT_S)
    (tmp_path / "sitecustomize.py").write_text(waits)
    program = subprocess.Popen(
        [sys.executable, "train.py", "configs/quickstart.yaml", "--dry-run"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that a shell runs in the background have it ignored, and so would the program.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(lambda: there.exists() or program.poll() is not None)
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=LIMIT_S)
    assert (program.returncode, said) == (INTERRUPTED, "interrupted\n")


def descendants(launcher: subprocess.Popen, word: str) -> list[psutil.Process]:
    """Those whose command has a word, as soon as there are some."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = [
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if word in process.cmdline()
        ]
        return bool(found) or launcher.poll() is not None

    until(look)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, sign",
    [
        ("deepspeed", "deepspeed.launcher.launch"),
        ("deepspeed", "train.py"),
        ("torchrun", "train.py"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_real_launchers_that_are_killed_early_leave_nothing_behind(
    tmp_path, model_folder, corpus, launcher, sign, number
):
    """While the node launcher imports, and as soon as there is a rank."""
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{path: {model_folder}}}\ndata: {{train: [{corpus}]}}\nrun: {{dir:"
        f" {tmp_path / 'run'}}}\n"
    )
    options = {
        "deepspeed": ["--num_accelerators", "2", "--master_port", "29587"],
        "torchrun": ["--nproc_per_node", "2", "--master_port", "29587"],
    }
    settings = TINY | {"budget.steps": 10_000, "checkpoint.every_n_steps": 0}
    command = [
        str(Path(sys.executable).with_name(launcher)),
        *options[launcher],
        "train.py",
        str(tmp_path / "tiny.yaml"),
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    with open(tmp_path / "log", "w") as log:
        started = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
    descendants(started, sign)
    started.send_signal(number)
    started.wait(timeout=LIMIT_S)
    try:
        psutil.wait_procs(relatives(tmp_path), timeout=LIMIT_S)
        assert not (left := relatives(tmp_path)), [
            (process.cmdline(), process.parents()) for process in left
        ]
    finally:
        for process in relatives(tmp_path):
            process.kill()
    said = (tmp_path / "log").read_text()
    assert "ended before the run began" in said or "Signal" in said or "SIGTERM" in said, said
    assert not (tmp_path / "run").exists()


def relatives(folder: Path) -> list[psutil.Process]:
    """Processes whose command names a folder, wherever they are now."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass  # it has just ended
    return found

"""Programs that cost no start, and a clone of the repository for each page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import REPOSITORY
from tests.docs.reader import make_clone


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory):
    """An environment in which the programs of a page are run by one warm process."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("rlp", "python", "deepspeed", "torchrun"):
        program = folder / name
        program.write_text(
            f"#!{sys.executable} -sE\n{Path(__file__).with_name('command.py').read_text()}"
        )
        program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:/usr/bin:/bin",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
        "RLP_PAGES_SOCKET": str(folder / "s"),
        "COLUMNS": "120",
    }
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("server.py")), str(folder / "s")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = iter(server.stdout.readline, "")
    assert "ready\n" in told, "the server of the pages has died"
    yield environment
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory, commands: dict[str, str]) -> Path:
    """What a reader starts from."""
    folder = tmp_path_factory.mktemp("clone")
    make_clone(folder, commands)
    return folder


@pytest.fixture
def scratch(clone: Path, tmp_path: Path) -> Path:
    """A copy of the clone for one page."""
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder, symlinks=True)
    return folder

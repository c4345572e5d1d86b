"""What `pip install` gives: all of the package, and something to train at once, without the
repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import REPOSITORY

ADVICE = "see [tool.setuptools] in pyproject.toml"


def succeeded(command: list[str], **settings: object) -> str:
    """What a command printed, which ended well."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a clean copy: of what Git has, and of what is new."""
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("rlp", "kernels"):
        shutil.copytree(
            REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    succeeded([*pip, "--no-deps", "--no-build-isolation", "."], cwd=copy)
    (built,) = copy.glob("*.whl")
    return built


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    """Modules, and what they read: pages, the base model, the quickstart's config."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    for home, package in ((REPOSITORY, "rlp"), (REPOSITORY / "kernels", "rlp_kernels")):
        files = {
            path.relative_to(home).as_posix()
            for path in (home / package).rglob("*")
            if path.is_file() and path.parent.name != "__pycache__"
        }
        assert len(files) > 3 and files - packed == set(), ADVICE


def test_the_wheel_brings_nothing_but_the_package(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rlp", "rlp_kernels"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Where the wheel is unpacked, and an environment with nothing of the repository."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder, os.environ | {"PYTHONPATH": str(folder), "DS_ACCELERATOR": "cpu"}


@pytest.mark.slow
def test_the_world_is_trained_by_the_wheel_alone(installed, tmp_path):
    """`rlp world` and `rlp train` in a folder with nothing in it."""
    _, alone = installed
    for command in (
        ["world", "w"],
        ["train", "w/quickstart.yaml", "budget.steps=2", "evaluation.panel_positions=16"],
    ):
        succeeded([sys.executable, "-m", "rlp", *command], cwd=tmp_path, env=alone)
    run = tmp_path / "runs" / "quickstart"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "export" / "model.safetensors").is_file() and (run / "report.html").is_file()


def test_the_world_is_written_by_the_wheel_alone(installed, tmp_path):
    """In a folder with nothing in it; its config is that of the repository, and finds all that it
    names from anywhere."""
    from rlp.config import load_config

    folder, alone = installed
    empty = tmp_path / "empty, with #"
    empty.mkdir()
    code = "import rlp, rlp_kernels; print(rlp.__file__, rlp_kernels.__file__, sep='\\n')"
    files = succeeded([sys.executable, "-c", code], cwd=empty, env=alone).splitlines()
    assert len(files) == 2 and all(file.startswith(str(folder)) for file in files)
    said = succeeded([sys.executable, "-m", "rlp", "world", "w"], cwd=empty, env=alone)
    assert "rlp train w/quickstart.yaml" in said

    world = empty / "w"
    config = load_config(world / "quickstart.yaml")
    assert config.model.path == str(world / "base")
    assert config.data.train == [str(world / "train.jsonl")]
    assert config.data.held_out == [str(world / "held_out.jsonl")]
    assert all(
        Path(path).exists()
        for path in (config.model.path, *config.data.train, *config.data.held_out)
    )
    own = load_config(REPOSITORY / "configs" / "quickstart.yaml")
    config.model, config.data.train, config.data.held_out = (
        own.model,
        own.data.train,
        own.data.held_out,
    )
    assert config == own

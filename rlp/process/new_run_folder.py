"""The folder of a new run: made whole, under its lock, or not at all."""

import errno
import os
from pathlib import Path

from rlp.config import Config, ConfigError, to_yaml
from rlp.process.environment import device_name, environment
from rlp.process.files import make_folder, new_folder, write_new
from rlp.process.json_files import json_bytes
from rlp.process.lock import RunLock
from rlp.process.ranks import Ranks
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import forget_logs


def create_run_folder(config: Config, ranks: Ranks, lock: RunLock) -> RunFolder:
    """Make the folder of a new run, which `lock` then holds, and write `config.yaml` and
    `environment.json`. Every rank calls it.

    Raises:
        ConfigError: on every rank, where rank 0 could not make the folder; above all where it
            exists.
    """
    folder = RunFolder(Path(config.run.dir))
    devices = ranks.gather(device_name(ranks.device))
    refusal = ranks.broadcast(_make(folder, config, devices, lock) if ranks.is_first else None)
    if refusal:
        raise ConfigError(refusal)
    forget_logs(folder)
    return folder


def _make(folder: RunFolder, config: Config, devices: list[str], lock: RunLock) -> str | None:
    """Rank 0's part: the reason why it can not be done, or None."""
    if obstacle := why_no_run_folder(folder.path):
        return obstacle
    try:
        # Complete before it has its name: a run that dies here leaves nothing that a restart would
        # refuse.
        with new_folder(folder.path, point="folder.before_rename") as path:
            new = RunFolder(path)
            for inner in (new.checkpoints, new.logs):
                make_folder(inner)
            write_new(new.config_yaml, to_yaml(config).encode(), point="folder.torn_config")
            write_new(
                new.environment_json,
                json_bytes(environment(devices), "environment.json"),
                point="folder.torn_environment",
            )
            lock.write_first(path)
    except OSError as error:
        return _refusal(folder.path, error)
    return None


def why_no_run_folder(path: Path) -> str | None:
    """Why a new run can not make its folder here; None where nothing is known that keeps it from
    doing so. Nothing is made."""
    if os.path.lexists(path):
        return _refusal(path, FileExistsError())

    parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir():
        code = errno.ENOTDIR
    elif not os.access(parent, os.W_OK | os.X_OK):
        code = errno.EACCES
    else:
        return None
    return _refusal(path, OSError(code, os.strerror(code), str(parent)))


def _refusal(path: Path, error: OSError) -> str:
    if os.path.lexists(path):
        return (
            f"run.dir {path} exists and is never written over. Write run.dir=OTHER for a new run,"
            " or run.resume=auto to continue it."
        )
    return (
        f"run.dir {path} can not be created: {error}. Write run.dir=OTHER, a folder that you may"
        " write to."
    )

"""The scripts of the experiments, which are no package."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from tests import REPOSITORY

_LOADED: dict[Path, dict[str, ModuleType]] = {}
"""By folder and name."""


def script(*parts: str) -> ModuleType:
    """A script by its path below experiments/, imported and not run, once.

    It finds the scripts beside it by their names, as it does when it is run; another experiment's
    of the same name (each has a run.py) are out of its way meanwhile.
    """
    path = Path(REPOSITORY, "experiments", *parts)
    folder, own = path.parent, _LOADED.setdefault(path.parent, {})
    names = [file.stem for file in folder.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(own)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # for what a function imports
        own.update({name: sys.modules.pop(name) for name in names if name in sys.modules})
        sys.modules.update(others)

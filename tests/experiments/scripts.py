"""The scripts of the experiments, which are no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

from tests import REPOSITORY


def script(*parts: str) -> ModuleType:
    """A script by its path below experiments/, imported and not run."""
    path = Path(REPOSITORY, "experiments", *parts)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

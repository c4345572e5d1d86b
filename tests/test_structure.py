"""What may import what, and what no file may do: read from the source, so that a shortcut fails
here before it is a habit."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.source_files import MODULES, PROGRAM, imports, name_of

ROOMS = (
    "writing",
    "config",
    "objective",
    "process",
    "data",
    "model",
    "world",
    "sampling",
    "learn",
    "measure",
    "step",
    "algorithm",
    "compare",
    "run",
    "trainer",
    "train",
    "post",
    "cli",
    "__main__",
)
"""A line of `rlp` imports from its own room and from those to its left. A room is a package, or one
file."""

MUST_NOT_KNOW = {
    "writing": {"rlp", "torch", "transformers", "numpy"},
    "config": {"torch", "transformers"},
    "data.lines": {"torch", "transformers"},  # what a row must hold
    "data.records": {"torch", "transformers"},
    "data.sources": {"torch", "transformers"},
    "data.unpacked": {"torch", "transformers"},
    "data": {"torch"},  # that thoughts exist
    "objective": {"rlp", "transformers", "deepspeed", "numpy"},
    "measure.metrics": {"rlp"},
    "measure.language": {"torch", "transformers", "numpy"},
}
"""Beyond the order: what a room or a module has no business with, with all that lies under each
name."""


def violations(module: str, source: str) -> list[str]:
    """What a module of `rlp` (`config`, `data.stream`) imports against the order of rooms or
    against `MUST_NOT_KNOW`."""
    room = module.partition(".")[0]
    hidden = set(ROOMS[ROOMS.index(room) + 1 :])
    ignorant = MUST_NOT_KNOW.get(room, set()) | MUST_NOT_KNOW.get(module, set())
    found = []
    for name in sorted(imports(source)):
        parts = name.split(".")
        if parts[0] == "rlp" and len(parts) > 1 and parts[1] in hidden:
            found.append(f"{module} imports {name}, which stands below it")
        if name.startswith("."):
            found.append(f"{module} imports {name}, which is not a whole name")
        if parts[0] == "experiments":
            found.append(f"{module} imports {name}, an experiment")
        if any(name == other or name.startswith(f"{other}.") for other in ignorant):
            found.append(f"{module} must not know {name}")
    return found


def cycles(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a ring, by their names below `rlp`."""
    needs = {}
    for module, source in sources.items():
        names = {name.removeprefix("rlp.") for name in imports(source) if name.startswith("rlp.")}
        needs[module] = sorted((names & sources.keys()) - {module})
    done: set[str] = set()
    found = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" > ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for other in needs[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in sources:
        visit(module, ())
    return found


UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe(source: str) -> list[str]:
    """Ways to run code that a file holds: pickle under any name, remote code of a Hub model, eval
    and exec."""
    found = [
        name
        for name in imports(source)
        if name.split(".")[0] in UNPICKLERS or name in ("torch.load", "torch.save")
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += (
                [f"{node.value.id}.{node.attr}"]
                if (node.value.id, node.attr)
                in (("torch", "load"), ("torch", "save"), ("yaml", "load"))
                else []
            )
        if isinstance(node, ast.Call):
            found += [
                f"{word.arg}="
                for word in node.keywords
                if word.arg in ("allow_pickle", "trust_remote_code")
                and not (isinstance(word.value, ast.Constant) and word.value.value is False)
            ]
            found += (
                [node.func.id]
                if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
                else []
            )
    return found


WRITERS = {
    "write_text",
    "write_bytes",
    "touch",
    "mkdir",
    "makedirs",
    "rename",
    "renames",
    "link",
    "symlink",
    "symlink_to",
    "hardlink_to",
    "truncate",
    "ftruncate",
    "utime",
    "copy2",
    "copyfile",
    "copytree",
    "move",
    "FileHandler",
    "mkstemp",
    "mkdtemp",
    "NamedTemporaryFile",
    "TemporaryFile",
    "TemporaryDirectory",
}
"""Attributes by which a file is made, named or changed, beside `open`."""


def writes(source: str) -> list[str]:
    """Where a source makes, names or changes a file by itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function, home = node.func, None
        name = (
            function.id
            if isinstance(function, ast.Name)
            else function.attr
            if isinstance(function, ast.Attribute)
            else ""
        )
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            home = function.value.id
        modes = [
            argument.value
            for argument in [
                *node.args,
                *(word.value for word in node.keywords if word.arg == "mode"),
            ]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        ]
        nowhere = bool(node.args) and ast.unparse(node.args[0]) == "os.devnull"
        if (
            name == "open"
            and not nowhere
            and (home == "os" or any(set(mode) & set("wax+") and len(mode) <= 3 for mode in modes))
        ):
            found.append(f"{home or ''}.open")
        if (
            name in WRITERS
            and home != "files"
            or (home, name) in (("os", "replace"), ("shutil", "copy"))
        ):
            found.append(f"{home}.{name}")
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in [*MODULES.values(), REPOSITORY / "train.py"] if path.stem != "files"],
    ids=lambda path: path.name,
)
def test_only_files_writes(path: Path):
    """One place knows how a file is opened safely, written whole and made to fail in tests."""
    assert writes(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "open(p, 'w')",
        "p.open('ab')",
        "open(p, mode='r+')",
        "os.open(p, 1)",
        "p.write_text('')",
        "os.replace(a, b)",
        "p.mkdir()",
        "shutil.move(a, b)",
        "logging.FileHandler(p)",
        "tempfile.NamedTemporaryFile()",
    ],
)
def test_the_checker_sees_a_write(source: str):
    assert writes(source) != []


def test_every_room_has_a_place_in_the_order():
    """A new room, or a new file beside the rooms, is given its place, or this fails."""
    assert {name.partition(".")[0] for name in MODULES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_a_module_imports_only_from_rooms_above_its_own(module: str):
    """So each room can be read, and tested, with what came before it."""
    assert violations(module, MODULES[module].read_text()) == []


def test_no_modules_import_each_other():
    """Within a room too: what a file needs can be read before it."""
    assert cycles({module: path.read_text() for module, path in MODULES.items()}) == []


def test_the_checker_sees_a_ring():
    sources = {
        "data.a": "import rlp.data.b",
        "data.b": "from rlp.data import c",
        "data.c": "def f():\n    from rlp.data.a import x",
    }
    assert cycles(sources) == ["data.a > data.b > data.c > data.a"]


@pytest.mark.parametrize(
    "path",
    [path for name, path in MODULES.items() if path.stem == "__init__" and name != "__init__"],
    ids=lambda path: path.parent.name,
)
def test_a_room_exports_nothing_itself(path: Path):
    """A name has one home, which is a file."""
    assert imports(path.read_text()) == set()


@pytest.mark.parametrize(
    "module, source",
    [
        ("model.layout", "from rlp.learn.teacher import Teacher"),
        ("model.layout", "def f():\n    from rlp.sampling.rollout import NoiseKey"),
        ("objective", "from rlp.config import Config"),
        ("objective", "import rlp"),
        ("data.stream", "import rlp.model.layout as m"),
        ("data.stream", "from rlp import model"),
        ("data.stream", "from rlp.model import layout"),
        ("data.stream", "from . import sources"),
        ("data.stream", "from .sources import Rows"),
        ("data.stream", "import torch"),
        ("config", "import torch.nn"),
        ("trainer", "import experiments.world"),
        ("model.scoring", "if True:\n    import rlp.learn.engine"),
    ],
)
def test_the_checker_sees_a_violation(module: str, source: str):
    """In each spelling of an import, also inside a function."""
    assert violations(module, source) != []


def test_the_checker_lets_the_order_through():
    assert (
        violations(
            "trainer", "from rlp.measure.panel import Panel\nimport rlp.config\nimport torch"
        )
        == []
    )
    assert (
        violations(
            "data.stream", "from rlp.config import Config\nfrom rlp.data.noise import keyed_noise"
        )
        == []
    )


def test_objective_imports_nothing_of_this_project():
    """It can be checked against the paper with a pencil."""
    assert {
        name.split(".")[0] for name in imports((REPOSITORY / "rlp" / "objective.py").read_text())
    } == {"torch"}


def test_no_module_is_a_drawer():
    """A thing lives where it belongs, not in utils."""
    drawers = {"utils", "util", "common", "helpers", "helper", "types", "misc", "base", "core"}
    assert [path for path in PROGRAM if path.stem in drawers or path.parent.name in drawers] == []


@pytest.mark.parametrize("path", PROGRAM, ids=name_of)
def test_nothing_imports_an_experiment(path: Path):
    """Experiments import the method, never the reverse."""
    assert [
        name for name in imports(path.read_text()) if name.split(".")[0] in ("experiments", "tests")
    ] == []


def test_kernels_do_not_know_the_method():
    """Fast twins of plain functions stand alone; their benchmark may run the method."""
    for path in (REPOSITORY / "kernels" / "rlp_kernels").glob("*.py"):
        assert [name for name in imports(path.read_text()) if name.split(".")[0] == "rlp"] == []


def test_kernels_is_no_package():
    """An importable `kernels` would shadow the Hugging Face package of that name, which
    transformers imports."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", PROGRAM, ids=name_of)
def test_no_file_is_read_as_code(path: Path):
    """No pickle, no torch.load, no remote code: a checkpoint or a corpus from a stranger runs
    nothing."""
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "torch.load(path)",
        "import dill as d",
        "def f():\n    import cloudpickle",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "eval(text)",
        "yaml.load(text)",
    ],
)
def test_the_checker_sees_code_in_files(source: str):
    assert unsafe(source) != []


def test_only_engine_names_deepspeed():
    """No DeepSpeed name leaves `engine`."""
    users = [
        path.name
        for path in PROGRAM
        if any(name.split(".")[0] == "deepspeed" for name in imports(path.read_text()))
    ]
    assert users == ["engine.py"]


def test_importing_rlp_imports_no_heavy_library():
    """deepspeed, wandb and datasets load when a run needs them, so `rlp report` starts on a laptop
    without them."""
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module('rlp.{name}')\n"
        for name in MODULES
        if not name.endswith("__init__")
    )
    code += (
        "print([name for name in ('deepspeed', 'wandb', 'datasets', 'trl', 'lm_eval',"
        " 'math_verify') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["rlp.config", "rlp.cli"])
def test_reading_a_config_or_a_command_line_imports_no_torch(module: str):
    """A config is read in the time that YAML takes, and a mistyped command is told at once."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}, sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.stdout.strip() == "False", done.stderr

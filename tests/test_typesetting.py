"""How long and how wide code may be, and what a comment that silences a check has to say."""

import ast
import re
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.source_files import PAGES, PYTHON, SETTINGS, imports, name_of

MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FILE, MOST_COLUMNS = 60, 600, 100
MOST_METHODS = 20

ONE_PAGE_HOWEVER_LONG = "rlp/config.py"
"""A list of fields, each with its meaning, is looked up and not read."""

LONG_FUNCTIONS: dict[str, set[str]] = {}
LONG_FILES: set[str] = set()
WIDE_FILES: set[str] = {
    "docs/warm_start.md",
}
UNEXPLAINED: set[str] = set()
"""What has still to be mended: nothing comes here anew, and what is mended is taken out."""


def long_functions(source: str) -> dict[str, int]:
    """Lines of each function that has too many, by its name; its decorators are not counted."""
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION}


def large_classes(source: str) -> dict[str, int]:
    """Methods of each class that has too many, by its name."""
    counts = {
        node.name: sum(isinstance(part, ast.FunctionDef) for part in node.body)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }
    return {name: methods for name, methods in counts.items() if methods > MOST_METHODS}


def wide_lines(text: str, *, only_code: bool = False) -> list[int]:
    """Numbers of the lines that are too wide; of a page, those between fences alone."""
    fenced, found = False, []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if len(line) > MOST_COLUMNS and (fenced or not only_code):
            found.append(number)
    return found


def unexplained(source: str) -> list[str]:
    """Comments that silence a check and do not say why, or do not say which."""
    silencers = re.findall(r"#\s*(?:noqa|type:\s*ignore).*", source)
    explained = re.compile(r"# noqa: [A-Z]+\d+(, ?[A-Z]+\d+)*[,;:]? +\W*[a-z]\w+ \w+")
    return [comment for comment in silencers if not explained.match(comment)]


def imported_tests(source: str) -> list[str]:
    """What a file of the tests imports from a test or a conftest."""
    return sorted(
        name
        for name in imports(source)
        if any(part.startswith("test_") or part == "conftest" for part in name.split("."))
    )


def test_no_function_is_long():
    found = {
        name_of(path): long_functions(path.read_text()).keys()
        - LONG_FUNCTIONS.get(name_of(path), set())
        for path in PYTHON
    }
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_no_class_is_large():
    """One that is has two jobs."""
    found = {name_of(path): large_classes(path.read_text()) for path in PYTHON}
    assert {name: classes for name, classes in found.items() if classes} == {}


def test_the_checker_sees_a_large_class():
    methods = "".join(f"    def m{number}(self): ...\n" for number in range(MOST_METHODS))
    assert large_classes(f"class Full:\n{methods}") == {}
    assert large_classes(f"class Over:\n{methods}    def one_more(self): ...\n") == {"Over": 21}


def test_no_file_is_long():
    """One that is gets split, by idea."""
    found = {name_of(path): len(path.read_text().splitlines()) for path in PYTHON}
    long = {name for name, lines in found.items() if lines > MOST_LINES_OF_A_FILE}
    assert long - LONG_FILES == {ONE_PAGE_HOWEVER_LONG}


def test_no_line_is_wide():
    """The text of a page is wrapped by whoever reads it; its code is not."""
    found = {
        name_of(path): wide_lines(path.read_text(), only_code=path.suffix == ".md")
        for path in [*PYTHON, *SETTINGS, *PAGES]
        if name_of(path) not in WIDE_FILES
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_what_silences_a_check_says_why():
    found = {
        name_of(path): unexplained(path.read_text())
        for path in PYTHON
        if path.name != Path(__file__).name  # has examples that do not
        and name_of(path) not in UNEXPLAINED
    }
    assert {name: comments for name, comments in found.items() if comments} == {}


def test_no_test_imports_from_a_test():
    """What several need is a fixture of a conftest, or stands in a module that is no test."""
    found = {
        name_of(path): imported_tests(path.read_text())
        for path in PYTHON
        if path.is_relative_to(REPOSITORY / "tests")
    }
    assert {name: names for name, names in found.items() if names} == {}


def test_the_checker_sees_a_long_function():
    """Also a method, and one inside another; 60 lines are not too many."""
    body = "    pass\n" * 59
    assert long_functions(f"def short():\n{body}") == {}
    assert long_functions(f"@once\ndef long():\n    '''Text.'''\n{body}") == {"long": 61}
    inner = "".join(f"    {line}\n" for line in f"async def inner():\n    1\n{body}".splitlines())
    assert long_functions(f"class A:\n{inner}") == {"inner": 61}


def test_the_checker_sees_a_wide_line():
    wide = "x" * 101
    assert wide_lines(f"{wide}\nx\n{wide[1:]}") == [1]
    assert wide_lines(f"{wide}\n```sh\n{wide}\n```\n{wide}", only_code=True) == [3]


@pytest.mark.parametrize(
    "comment, passes",
    [
        ("# noqa", False),
        ("#noqa: F401", False),
        ("# noqa: F401", False),
        ("# noqa: F401, E402", False),
        ("# noqa: because it is needed", False),
        ("# type: ignore", False),
        ("# noqa: F401, before torch: see rlp/process/machine.py", True),
        ("# noqa: F401, E402  the import has effects", True),
        ("# noqa: F401  (the import has effects)", True),
    ],
)
def test_the_checker_sees_a_silencer_without_a_reason(comment: str, passes: bool):
    assert (unexplained(f"import x  {comment}\n") == []) == passes


@pytest.mark.parametrize(
    "source",
    [
        "from tests.whole.test_training import curve",
        "from tests.whole import test_training",
        "import test_training",
        "def f():\n    from tests.conftest import corpus",
    ],
)
def test_the_checker_sees_a_test_that_imports_a_test(source: str):
    assert imported_tests(source) != []
    assert imported_tests("from tests.training import tiny_config") == []

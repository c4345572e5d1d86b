"""The experiment on variety: what counts as a number, chances by hand, and a page that says what
its results say."""

import sys

import numpy as np
import pytest

from rlp.measure.pages import fill_page
from tests import REPOSITORY

FOLDER = REPOSITORY / "experiments" / "diversity"


@pytest.fixture(scope="module")
def scripts():
    """Its modules import each other by their names, as scripts of one folder do."""
    names = ("cells", "exact", "report", "run")
    hidden = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(FOLDER))
    try:
        import exact
        import report
        import run

        yield {"exact": exact, "report": report, "run": run}
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in hidden.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        (" 5\n\nThe answer is: 5", 5),
        ("The number is 10.", 10),
        ("1. 1\n2. 2", None),
        ("11", None),
        ("0", None),
        ("3.5", None),
        ("seven", None),
    ],
)
def test_a_list_is_no_choice_of_a_number(scripts, text, number):
    assert scripts["run"].number_of(text) == number


def test_the_chance_of_a_number_ends_where_no_digit_follows(scripts):
    """Tokens 0 and 1 are digits, 2 is not; of "1" the next may be a digit with 1/2 at T 1."""
    logits = np.log(np.array([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]))
    is_digit = np.array([True, True, False])
    chance = scripts["exact"]._chance
    assert chance(logits, [1], is_digit, 1.0) == pytest.approx(0.5 * 0.5)
    # At T 1/2 the shares are squared: 4/6, and 4/6 for what is no digit.
    assert chance(logits, [1], is_digit, 0.5) == pytest.approx(4 / 6 * 4 / 6)


def test_the_page_says_what_the_results_say(scripts):
    """Every line of its tables is made from results.jsonl, to the letter."""
    results = scripts["run"].read_results(FOLDER / "results.jsonl", scripts["run"].LAYOUT)
    page = (FOLDER / "README.md").read_text()
    assert fill_page(page, scripts["report"].tables(results)) == page

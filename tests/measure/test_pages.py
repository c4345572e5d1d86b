"""Parts of a page that are made from results."""

import pytest

from rlp.measure.pages import fill_page, markdown_table

PAGE = "# A\n<!-- made one -->\nold\n<!-- end -->\nby hand\n<!-- made two -->\n<!-- end -->\n"


def test_a_table_has_a_line_for_its_titles_a_rule_and_one_for_each_row():
    made = markdown_table(["a", "b"], [["1", "2"], ["3", ""]])
    assert made == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"
    with pytest.raises(ValueError, match="row 1 has 1 cells under 2 titles"):
        markdown_table(["a", "b"], [["1"]])


def test_parts_are_made_anew_and_the_rest_stays():
    filled = fill_page(PAGE, {"one": r"new \1"})
    assert filled == PAGE.replace("old", r"new \1")
    assert fill_page(filled, {"one": "old"}) == PAGE
    assert fill_page(PAGE, {}) == PAGE


@pytest.mark.parametrize(
    "page",
    [
        PAGE.replace("made one", "made other"),
        PAGE + PAGE,
        PAGE.replace("old\n<!-- end -->\n", ""),
        "<!-- made one -->\n",
    ],
)
def test_a_part_without_one_place_is_refused(page):
    with pytest.raises(ValueError, match="one place for 'one'"):
        fill_page(page, {"one": "x"})

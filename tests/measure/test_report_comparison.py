"""Arms of a report against its first arm: paired differences, and where there is no verdict."""

import re

import pytest

from rlp.process.json_files import read_json, write_json
from tests.measure.report_pages import Tags, page_of
from tests.measure.run_folders import PANEL, make_run

ACCURACY = [0.9, 0.8, 0.9, 0.7, 0.9, 0.8]


def arm(folder, name, accuracies, *, cold=None):
    """One ended run for each accuracy, by seed."""
    paths = []
    for seed, accuracy in enumerate(accuracies):
        path = make_run(folder / f"{name}_seed{seed}", steps=0, seed=seed)
        after = PANEL | {"accuracy_with_thought": accuracy}
        summary = read_json(path / "summary.json") | {"after": after}
        if cold is not None:
            summary |= {"before_cold": PANEL, "after_cold": PANEL | {"accuracy_with_thought": cold}}
        write_json(path / "summary.json", summary, point="end.torn_summary")
        paths.append(path)
    return paths


def shown(tmp_path, *paths):
    """The text of the page's comparison, and its rows as lists of cells."""
    page = page_of(*paths, out=tmp_path / "page.html")
    part = page[page.index("<h2>Arms against") :]
    part = part[: part.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", part, flags=re.DOTALL)
    cells = [[Tags(cell).text.strip() for cell in re.findall(r"<td.*?</td>", row)] for row in rows]
    return Tags(part).text, [row for row in cells if row]


def test_arms_are_compared_with_the_first_one(tmp_path, undrawn):
    """Always 0.2 above, over six seeds: p is 2/64. What does not differ is not told apart."""
    paths = arm(tmp_path, "rlp", ACCURACY) + arm(tmp_path, "cpt", [a - 0.2 for a in ACCURACY])
    text, rows = shown(tmp_path, *paths)
    words = ("Accuracy with a thought", "cpt", "+0.200", "+0.200 to +0.200", "0.0312", "0.0312")
    assert rows[0] == [*words, "rlp is above it"]
    assert rows[1][2:] == ["+0.000", "+0.000 to +0.000", "1.0000", "1.0000", "not told apart"]
    assert (
        "Accuracy with a thought: rlp is above cpt (exact paired test, 6 seeds, Holm over 1 arm)."
        in text
    )


def test_cold_thoughts_have_a_family_of_their_own(tmp_path, undrawn):
    paths = arm(tmp_path, "rlp", ACCURACY, cold=0.5) + arm(tmp_path, "cpt", ACCURACY, cold=0.75)
    text, _ = shown(tmp_path, *paths)
    assert "Accuracy with a thought: rlp is not told apart from cpt" in text
    assert "Accuracy with a thought, cold thoughts: rlp is below cpt" in text
    whole = Tags((tmp_path / "page.html").read_text()).text
    assert whole.index("Accuracy with a thought, cold thoughts") < whole.index("Arms against rlp")
    alone = Tags(page_of(paths[0], out=tmp_path / "alone.html")).text
    assert "Accuracy with a thought, cold thoughts, fraction0.1250.500+0.375" in "".join(
        alone.replace("\n", "").split("  ")
    ).replace("> ", "")


@pytest.mark.parametrize(
    "change, said",
    [
        (("min_prefix_tokens: 1", "min_prefix_tokens: 2"), "differ in position.min_prefix_tokens"),
        (("seed: 1\n", "seed: 0\n"), "cpt has several runs of one seed"),
        (("seed: 1\n", "seed: 7\n"), "the reference alone has seed 1 and the arm alone has seed 7"),
        (None, "5 seeds can not tell one of 1 arms apart at 0.05"),
    ],
)
def test_what_can_not_be_compared_is_said(tmp_path, undrawn, change, said):
    """Another panel, a seed that stands twice, one that is not the other's, and too few."""
    few = ACCURACY[:5] if change is None else ACCURACY
    paths = arm(tmp_path, "rlp", few) + arm(tmp_path, "cpt", [a - 0.2 for a in few])
    if change is not None:
        config = tmp_path / "cpt_seed1" / "config.yaml"
        text = config.read_text().replace(*change)
        assert text != config.read_text()
        config.write_text(text.replace("arm: ''", "arm: cpt"))
        for seed in (0, 2, 3, 4, 5):
            other = tmp_path / f"cpt_seed{seed}" / "config.yaml"
            other.write_text(other.read_text().replace("arm: ''", "arm: cpt"))
    text, rows = shown(tmp_path, *paths)
    assert said in text and rows[0][-1].startswith("no verdict: ") and "is above" not in text

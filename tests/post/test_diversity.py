"""Diversity: known answers, every mean over pairs against a loop over pairs, and what it must not
depend on."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlp.cli import main
from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.post import diversity_measures as measures
from rlp.post.diversity import measure
from rlp.post.diversity_samples import Prompt, Sample, committed_panel, read_prompts, read_samples

pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra post)")

ANSWERS = [("a", "p", "red blue"), ("a", "p", "red green"), ("b", "p", "red blue")]


def samples_of(rows, kind: str = "open", answers: tuple[str, ...] = ()) -> list[Sample]:
    """Of (model, prompt, text) each."""
    return [Sample(model, Prompt(prompt, kind, answers), text) for model, prompt, text in rows]


def figures(rows, **options) -> dict:
    return measure(samples_of(rows), **options)["open"]


def grid(models: str, prompts: str, texts: int, text) -> list[tuple[str, str, str]]:
    """`texts` answers of each model to each prompt."""
    return [(m, q, text(m, q, i)) for m in models for q in prompts for i in range(texts)]


NUMBERS = ("intra", "inter", "floor", "duplicates", "verbatim")


# Known answers


@pytest.mark.parametrize("models", ["ab", "abcde"])
@pytest.mark.parametrize("text", ["the same answer here", "7", "!!!", "\u4f60\u597d"])
def test_identical_answers_are_one_text(models: str, text: str):
    """To the digit, however short they are and however many models there are."""
    found = figures(grid(models, "pq", 3, lambda m, q, i: text))
    assert {name: found[name] for name in NUMBERS} == dict.fromkeys(NUMBERS, 1.0)
    assert (found["vendi"], found["inter_above_floor"], found["answer_entropy"]) == (1, 0, 0)


@pytest.mark.parametrize("models", ["ab", "abcde"])
def test_answers_without_a_common_word_have_nothing_in_common(models: str):
    """Vendi counts them all; the end of a sentence is no word."""
    count = itertools.count()
    found = figures(grid(models, "pq", 4, lambda m, q, i: f"w{next(count)} x{next(count)}."))
    assert {name: found[name] for name in NUMBERS} == dict.fromkeys(NUMBERS, 0.0)
    assert found["vendi"] == 4 and found["distinct_1"] == 1
    assert found["answer_entropy"] == pytest.approx(math.log(4))


def test_the_floor_tells_one_style_from_one_answer():
    """Models that say the same to every prompt have inter 1 and nothing above the floor; models
    that agree at each prompt alone have all of it."""
    style = figures(grid("ab", "pqr", 2, lambda m, q, i: "as an assistant"))
    answer = figures(grid("ab", "pqr", 2, lambda m, q, i: f"word{q}"))
    assert (style["inter"], style["floor"], style["inter_above_floor"]) == (1, 1, 0)
    assert (answer["inter"], answer["floor"], answer["inter_above_floor"]) == (1, 0, 1)


def test_a_model_that_repeats_itself_need_agree_with_nobody():
    """Why intra alone misleads."""
    found = figures(grid("ab", "pq", 3, lambda m, q, i: f"{m}{q}"))
    assert (found["intra"], found["inter"], found["duplicates"], found["verbatim"]) == (1, 0, 1, 0)
    assert found["models_among_nearest"] == pytest.approx(1)


AXES = {"x": [1, 0, 0], "y": [0, 2, 0], "xy": [1, 1, 0], "z": [0, 0, 3]}


def by_axes(texts: list[str]) -> np.ndarray:
    """An embedding whose cosines are known: x and xy have 1 / sqrt(2)."""
    return np.array([AXES[text] for text in texts])


def test_means_over_pairs_by_hand():
    """a answers p with x, xy and q with z; b answers p with y, y and q with x, z."""
    rows = [("a", "p", "x"), ("a", "p", "xy"), ("a", "q", "z"), ("a", "q", "z")]
    rows += [("b", "p", "y"), ("b", "p", "y"), ("b", "q", "x"), ("b", "q", "z")]
    found = figures(rows, embedding=by_axes)
    half = 0.5**0.5
    assert found["matrix"]["a"]["a"] == pytest.approx((half + 1) / 2)
    assert found["matrix"]["b"]["b"] == pytest.approx((1 + 0) / 2)
    # At p: x-y 0, xy-y half, each twice; at q: z-x 0, z-z 1, each twice.
    assert found["matrix"]["a"]["b"] == found["matrix"]["b"]["a"] == found["inter"]
    assert found["inter"] == pytest.approx((half / 2 + 1 / 2) / 2)
    # a at p with b at q: x-x 1, xy-x half, against z 0; a at q with b at p: z-y 0.
    assert found["floor"] == pytest.approx((1 + half) / 4 / 2)


def test_a_word_that_all_texts_have_weighs_less():
    """TF-IDF by hand: of two texts that share one of two words, the shared one weighs ln(2/2) + 1,
    the other ln(2/1) + 1."""
    rows = measures.embedded(["red blue", "red green", "red blue"], None).toarray()
    assert rows[0] @ rows[1] == pytest.approx(1 / (1 + (1 + math.log(2)) ** 2))
    assert rows[0] @ rows[2] == pytest.approx(1)


def test_a_mean_over_models_is_one_over_models_not_over_texts():
    """A model with more answers does not count for more."""
    rows = [("a", "p", "x")] * 10 + [("b", "p", "x"), ("b", "p", "y")]
    assert figures(rows, embedding=by_axes)["intra"] == pytest.approx((1 + 0) / 2)


@pytest.mark.parametrize("cosine", [0.0, 0.5, 1.0])
def test_vendi_of_two_texts_is_the_entropy_of_two_eigenvalues(cosine: float):
    """(1 + c) / 2 and (1 - c) / 2."""
    turned = {"one": [1, 0], "two": [cosine, (1 - cosine**2) ** 0.5]}
    found = figures(
        [("a", "p", "one"), ("a", "p", "two")], embedding=lambda texts: [turned[t] for t in texts]
    )
    shares = np.array([1 + cosine, 1 - cosine]) / 2
    shares = shares[shares > 0]
    assert found["vendi"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_vendi_is_the_same_from_the_smaller_product():
    """Five texts in three coordinates: [3, 3] and [5, 5] have the same eigenvalues above 0."""
    rows = np.random.default_rng(0).normal(size=(5, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    wide = np.hstack([rows, np.zeros((5, 9))])
    one, other = (measures.vendi(measures.sparse.csr_array(part)) for part in (rows, wide))
    assert one == pytest.approx(other)


def test_counts_of_texts_by_hand():
    """Pairs that are equal, runs that are different, nats of the answers."""
    assert measures.duplicates(["a b", "a  b\n", "b"]) == pytest.approx(1 / 3)
    assert measures.distinct(["a b a", "b a b"], 2) == pytest.approx(2 / 4)
    assert math.isnan(measures.distinct(["a", "b"], 2))
    assert measures.answer_entropy(["Seven.", "seven", "8", "8!"]) == pytest.approx(math.log(2))


def test_verbatim_is_the_share_of_runs_that_stand_in_the_other_text():
    """Of b's two runs of five words a's six have one, and of a's two b has one; a text that is
    shorter is one run, which is found whole only."""
    rows = [("a", "p", "one two three four five six"), ("b", "p", "zero one two three four five")]
    assert figures(rows)["verbatim"] == pytest.approx(1 / 2)
    short = [("a", "p", "seven"), ("b", "p", "the number seven")]
    assert figures(short)["verbatim"] == 0


def test_the_nearest_answers_are_counted_by_model():
    """Four equal answers of two models, two taken together: an answer and one of three others,
    which is of its own model with 1 in 3."""
    found = figures(grid("ab", "p", 2, lambda m, q, i: "same"))
    shares = np.array([1 / 2 + 1 / 6, 1 / 3])
    assert found["models_among_nearest"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_unspaced_scripts_have_a_word_for_each_letter():
    """So that two Chinese sentences can share a part."""
    assert measures.words("GPT\u4f60\u597d x1") == ["gpt", "\u4f60", "\u597d", "x1"]
    assert measures.words("caf\u00e9") == measures.words("cafe\u0301")


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("It is Paris.", ("Paris",), True),
        ("it is PARIS", ("Paris",), True),
        ("Parisian", ("Paris",), False),
        ("The answer is 4.", ("4",), True),
        ("14", ("4",), False),
        ("4.5", ("4",), False),
        ("3.4", ("4",), False),
        ("1,400", ("400",), False),
        ("four", ("4", "four"), True),
        ("carbon\ndioxide", ("carbon dioxide",), True),
        ("", ("4",), False),
    ],
)
def test_an_answer_is_right_where_it_stands_as_whole_words(text, answers, right):
    assert measures.is_right(text, answers) is right


def test_closed_prompts_have_an_accuracy_and_empty_texts_are_wrong():
    rows = [("a", "p", "It is 4"), ("a", "p", "5"), ("a", "p", " "), ("a", "p", "4!")]
    found = measure(samples_of(rows, "closed", ("4",)))
    assert found["open"] is None
    assert found["closed"]["accuracy"] == 0.5 and found["closed"]["empty_frac"] == 0.25
    assert found["closed"]["categories"] == {}


# Against a loop over pairs


def cosines(texts: list[str]) -> np.ndarray:
    rows = measures.embedded(texts, None).toarray()
    return rows @ rows.T


def by_loops(rows: list[tuple[str, str, str]]) -> dict[str, float]:
    """Intra, inter and floor as the definitions have them, pair by pair."""
    near = cosines([text for _, _, text in rows])
    models, prompts = sorted({m for m, _, _ in rows}), sorted({q for _, q, _ in rows})

    def mean(pairs) -> float:
        values = [near[i, j] for i, j in pairs]
        return np.mean(values) if values else np.nan

    def cell(m, q):
        return [i for i, row in enumerate(rows) if row[:2] == (m, q)]

    def elsewhere(m, q):
        return [
            mean(itertools.product(here, cell(m[1], other)))
            for here in [cell(m[0], q)]
            for other in prompts
            if other != q and here and cell(m[1], other)
        ]

    intra = [[mean(itertools.combinations(cell(m, q), 2)) for q in prompts] for m in models]
    pairs = list(itertools.combinations(models, 2))
    inter = [[mean(itertools.product(cell(m, q), cell(k, q))) for q in prompts] for m, k in pairs]
    floor = [
        [
            np.mean([np.mean(elsewhere(one, q) or [np.nan]) for one in ((m, k), (k, m))])
            for q in prompts
        ]
        for m, k in pairs
    ]
    with np.errstate(all="ignore"):
        return {
            name: np.nanmean(
                [np.nanmean(row) for row in table if not np.isnan(row).all()] or [np.nan]
            )
            for name, table in (("intra", intra), ("inter", inter), ("floor", floor))
        }


TEXTS = st.lists(st.sampled_from("red blue green one two".split()), min_size=1, max_size=4).map(
    " ".join
)
ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("pqr"), TEXTS), min_size=4, max_size=16
)


@settings(max_examples=15, deadline=None)
@given(ROWS)
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_sums_of_cells_give_the_means_over_pairs(rows):
    """Whichever models answered whichever prompts, however often."""
    found, expected = figures(rows), by_loops(rows)
    if len({m for m, _, _ in rows}) == 1:
        expected.pop("floor")
    for name, value in expected.items():
        assert found[name] == (None if np.isnan(value) else pytest.approx(value, abs=1e-9)), name


# What it must not depend on


@settings(max_examples=6, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_nothing_depends_on_the_order_of_lines(rows, random):
    mixed = list(rows)
    random.shuffle(mixed)
    assert measure(samples_of(mixed)) == measure(samples_of(rows))


@settings(max_examples=6, deadline=None)
@given(ROWS)
def test_nothing_depends_on_what_models_are_called(rows):
    """Names that sort the other way round."""
    names = {"a": "z", "b": "y", "c": "x"}
    one = figures(rows)
    other = figures([(names[m], q, text) for m, q, text in rows])
    for name in ("matrix", "floor_matrix", "models"):
        one.pop(name), other.pop(name)
    assert json.dumps(other) == json.dumps(one)


@settings(max_examples=6, deadline=None)
@given(ROWS)
def test_a_copy_of_every_model_changes_no_model(rows):
    """TF-IDF knows different texts only, so how many models there are is nothing to it."""
    one = figures(rows)
    other = figures(rows + [(f"copy of {m}", q, text) for m, q, text in rows])
    for name in sorted({m for m, _, _ in rows}):
        assert other["matrix"][name][name] == one["matrix"][name][name]
        assert other["models"][name] == one["models"][name]
    for name in ("intra", "duplicates", "vendi"):
        assert other[name] == one[name]


def test_the_open_prompts_do_not_know_of_the_closed_ones():
    rows = grid("ab", "pq", 3, lambda m, q, i: f"word {q} {i} {m}")
    closed = samples_of([("a", "c", "word"), ("b", "c", "word")], "closed", ("word",))
    both = measure([*samples_of(rows), *closed])
    assert both["open"] == figures(rows) and both["closed"] is not None


def test_intervals_are_over_prompts():
    """Prompts that are all alike leave none; prompts that differ leave one about the figure, and
    the headline's is of the difference."""
    alike = figures(grid("ab", "pqrs", 2, lambda m, q, i: f"same{q}"))
    assert alike["intervals"]["inter"] == [1, 1] and alike["intervals"]["floor"] == [0, 0]
    mixed = figures(grid("ab", "pqrs", 2, lambda m, q, i: q if q in "pq" else f"{m}{q}"))
    low, high = mixed["intervals"]["inter_above_floor"]
    assert low < mixed["inter_above_floor"] == 0.5 < high


def test_the_interval_of_the_floor_counts_both_prompts_of_a_pair():
    """Against resamples of the whole table of pairs of prompts, where a prompt may come twice; a
    mean over pairs that forgot one of the two would have half the width."""
    texts = {q: "red " * (n % 3 == 0) + f"w{n}" for n, q in enumerate("abcdefghijklmnopqrstuvwx")}
    rows = grid("m", "".join(texts), 2, lambda m, q, i: texts[q])
    found = figures(rows)
    names = sorted(texts)
    near = cosines([texts[q] for q in names])
    generator, drawn = np.random.default_rng(1), []
    for _ in range(2000):
        which = generator.integers(len(names), size=len(names))
        apart = np.not_equal.outer(which, which)
        drawn.append(near[np.ix_(which, which)][apart].mean())
    low, high = found["intervals"]["floor"]
    expected = np.subtract(*np.percentile(drawn, [97.5, 2.5]))
    assert high - low == pytest.approx(expected, rel=0.25)


def test_the_first_words_alone_are_measured():
    """Accuracy is of the whole text."""
    rows = [("a", "p", "one two three four 4"), ("a", "p", "one two five six 4")]
    found = measure(samples_of(rows, "closed", ("4",)), first_words=2)["closed"]
    assert (found["intra"], found["accuracy"], found["words"]) == (1, 1, 2)


# What is missing, and what can not be used


def notes_of(samples: list[Sample]) -> str:
    return "\n".join(measure(samples)["notes"])


def test_one_model_has_no_inter_and_says_so():
    rows = grid("a", "pq", 2, lambda m, q, i: f"x {q}")
    found = figures(rows)
    assert found["inter"] is None and found["verbatim"] is None and found["floor"] is not None
    assert found["inter_above_floor"] is None and found["matrix"] == {"a": {"a": found["intra"]}}
    assert "all samples are of one model, 'a'" in notes_of(samples_of(rows))


def test_what_has_no_pair_is_left_out_and_counted():
    rows = [("a", "p", "x"), ("a", "q", "x"), ("a", "q", "x"), ("b", "p", "x"), ("b", "p", "")]
    found, notes = figures(rows), notes_of(samples_of(rows))
    assert found["intra"] == 1 and found["inter"] == 1
    assert found["models"]["b"]["intra"] is None
    assert "1 of 5 texts are empty" in notes
    assert "2 times a model has one text alone" in notes
    assert "1 of 2 prompts are not answered by every model" in notes


def test_texts_that_are_all_empty_give_no_figure():
    found = figures([("a", "p", ""), ("a", "p", " ")])
    assert found["intra"] is None and found["floor"] is None and found["empty_frac"] == 1


def test_a_closed_prompt_without_an_answer_counts_in_all_but_accuracy():
    named = samples_of([("a", "p", "4"), ("a", "p", "4")], "closed", ("4",))
    unnamed = samples_of([("a", "q", "no"), ("a", "q", "no")], "closed")
    found = measure([*named, *unnamed])
    assert found["closed"]["accuracy"] == 1 and found["closed"]["intra"] == 1
    assert "1 of 2 prompts name no answer, such as 'q'" in "\n".join(found["notes"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda texts: np.zeros((len(texts), 2)), "length 0"),
        (lambda texts: np.full((len(texts), 2), np.nan), "length nan"),
        (lambda texts: np.ones((1, 2)), r"shape \(1, 2\) for 2 texts"),
    ],
)
def test_an_embedding_that_can_not_be_used_is_refused(rows, message):
    with pytest.raises(ConfigError, match=message):
        figures([("a", "p", "one"), ("a", "p", "two")], embedding=rows)


LINE = {"model": "a", "prompt": "p", "kind": "open", "text": "x"}


def written(path: Path, lines: list) -> Path:
    path.write_text("".join((json.dumps(x) if isinstance(x, dict) else x) + "\n" for x in lines))
    return path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty: it has no sample"),
        (["", " "], "is empty: it has no sample"),
        (["{"], "line 1 is no JSON"),
        (["[1]"], "line 1: got a list"),
        ([LINE, LINE | {"kind": "ajar"}], "line 2: \"kind\" is 'ajar'"),
        ([{"model": "a", "prompt": "p", "kind": "open"}], '"text" is missing'),
        ([LINE | {"model": 3}], '"model" is 3, expected a text'),
        ([LINE | {"kind": "closed", "answer": 4}], '"answer" is 4'),
        (
            [LINE | {"kind": "closed", "answer": one} for one in ("4", "5")],
            r"the right answer to 'p' is \['5'\], and \['4'\] at .* line 1",
        ),
        (
            [LINE | {"temperature": one} for one in (0.7, 1.0)],
            "line 2: 'a' was drawn with temperature 1.0, and at .* with temperature 0.7",
        ),
    ],
)
def test_samples_that_can_not_be_used_are_refused_by_their_line(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_samples(written(tmp_path / "samples.jsonl", lines))


def test_the_committed_panel_is_five_categories_and_answers():
    panel = committed_panel()
    kinds = {kind: [one for one in panel if one.kind == kind] for kind in ("open", "closed")}
    assert len(kinds["open"]) == 60 and len(kinds["closed"]) == 40
    categories = [prompt.category for prompt in kinds["open"]]
    assert {name: categories.count(name) for name in categories} == dict.fromkeys(
        ("creative", "advice", "numbers", "names", "opinions"), 12
    )
    assert all(prompt.answers for prompt in kinds["closed"])
    assert len({prompt.text for prompt in panel}) == 100


def test_a_prompt_that_stands_twice_is_refused(tmp_path):
    line = {"prompt": "p", "kind": "open"}
    with pytest.raises(DataError, match="'p' stands there twice"):
        read_prompts(written(tmp_path / "panel.jsonl", [line, line]))


# The command


def test_the_command_measures_a_file_and_writes_json(tmp_path, capsys):
    lines = [
        LINE | {"model": m, "prompt": q, "text": "same words"} for m in "ab" for q in "pqr"
    ] * 2
    samples, out = written(tmp_path / "samples.jsonl", lines), tmp_path / "out.json"
    assert main(["diversity", "--samples", str(samples), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["closed"] is None and found["open"]["inter"] == 1
    assert found["open"]["matrix"] == {"a": {"a": 1, "b": 1}, "b": {"a": 1, "b": 1}}
    assert found["settings"]["embedding"] == "TF-IDF of words"
    said = capsys.readouterr().out
    assert "inter above the floor +0.000 [+0.000, +0.000] (inter 1.000, floor 1.000)" in said
    assert "closed: no prompt is of this kind" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--samples", "{there}/none.jsonl"], 2, "no file at {there}/none.jsonl"),
        (["--samples", "{there}/empty.jsonl"], 3, "{there}/empty.jsonl is empty"),
        (["--samples", "{there}/s.jsonl", "--json", "{there}/s.jsonl"], 2, "never written over"),
        (["--samples", "{there}/s.jsonl", "--words", "0"], 2, "--words must be at least 1"),
        (["--samples", "{there}/s.jsonl", "--embedding", "no.where:f"], 2, "no module 'no"),
        (["--samples", "{there}/s.jsonl", "--of", "thought"], 3, '"thought" is missing'),
        (["there", "--names", "a,b"], 2, "--names has 2 names for 1 checkpoints"),
        (["there", "--frame", "nothing"], 2, "has no {prompt}"),
        (["there", "--top-p", "0"], 2, "a top_p above 0"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, arguments, code, message):
    (tmp_path / "empty.jsonl").touch()
    written(tmp_path / "s.jsonl", [LINE])
    arguments = [word.replace("{there}", str(tmp_path)) for word in arguments]
    assert main(["diversity", *arguments]) == code
    said = capsys.readouterr().err
    assert message.replace("{there}", str(tmp_path)) in said and said.count("\n") == 1

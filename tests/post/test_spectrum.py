"""Spectrum tuning: the right predictions by another computation, the mask by hand and through TRL,
measures with known answers, a model whose probabilities are known, the stage, and the command."""

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlp.cli import main
from rlp.compare.asked_model import AskedModel
from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.post.distributions import divergence
from rlp.post.evaluations import EVALUATIONS, Reading, open_spectrum, read_spectrum
from rlp.post.pipeline_config import SpectrumStage, load_pipeline
from rlp.post.spectrum_measures import (
    excess_nats,
    expected_yield,
    mass_of,
    renormalized,
    yield_of,
)
from rlp.post.spectrum_rows import (
    NO_LOSS,
    Row,
    RowFormat,
    RowWriter,
    is_dropped,
    make_rows,
    row_example,
    row_examples,
    row_of,
    write_rows,
)
from rlp.post.spectrum_scoring import (
    Asked,
    bayes,
    context_ids,
    figures_of,
    make_questions,
    option_logprobs,
    score_oracle,
    uniform,
)
from rlp.post.spectrum_tasks import FAMILIES, Task, draw_tasks
from rlp.post.stages.interface import Made, Work
from rlp.post.stages.rows import read_rows
from rlp.post.stages.spectrum import tune
from rlp.process.json_files import read_json
from rlp.process.ranks import start_ranks
from rlp.world.folder import make_model_config, make_tokenizer
from rlp.world.problems import CLOSE, OPEN

NOISE = np.random.default_rng(0)

# Tasks


def test_bayes_for_an_urn_is_what_counting_fillings_gives():
    """Fractions over all ways to fill it, and not a line of the family."""
    urn = FAMILIES["urn"](NOISE)
    fillings = [one for one in product(range(1, 7), repeat=3) if sum(one) == 8]
    for history in ([], [0], [2, 2, 0], [1] * 7):
        weight = [math.prod(Fraction(one[y], 8) for y in history) for one in fillings]
        expected = [
            sum(w * Fraction(one[y], 8) for w, one in zip(weight, fillings)) / sum(weight)
            for y in range(3)
        ]
        found = urn.predictive([(0, y) for y in history], 0)
        assert found == pytest.approx([float(share) for share in expected], abs=1e-12)


def test_a_coin_of_the_nine_that_showed_heads_once_shows_it_again_at_19_in_30():
    """sum p^2 / sum p over tenths: 2.85 / 4.5."""
    coin = FAMILIES["coin"](NOISE)
    assert coin.predictive([(0, 0)], 0)[0] == pytest.approx(19 / 30)
    assert coin.predictive([], 0)[0] == pytest.approx(1 / 2)


def test_what_one_coin_shows_says_nothing_of_the_other():
    coins = FAMILIES["coins"](NOISE)
    for one, other in ((0, 1), (1, 0)):
        seen = [(one, 0)] * 5
        assert coins.predictive(seen, other)[0] == pytest.approx(1 / 2)
        assert coins.predictive(seen, one)[0] > 0.8


def test_pairs_that_no_distribution_draws_are_refused():
    week = FAMILIES["weekday"](NOISE)
    assert week.predictive([(0, 0)], 0)[5] == pytest.approx((1 / 49) / (1 / 7 + 1 / 5))
    digits = FAMILIES["numbers_10"](NOISE)
    narrow = replace(
        digits, shares=digits.shares[1:3], prior=np.array([0.5, 0.5]), descriptions=("a", "b")
    )
    with pytest.raises(ValueError, match="none of its distributions draws"):
        narrow.predictive([(0, 0), (0, 9)], 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_tells_its_distributions_apart_in_words(name):
    """Options, descriptions, and the hidden one are all different; draws are valid, and modes are
    the most likely ones."""
    family = FAMILIES[name](NOISE)
    assert len({family.description, *family.descriptions}) == len(family.descriptions) + 1
    assert len(set(family.options)) == len(family.options)
    for which in range(len(family.descriptions)):
        task, shares = Task(family, which, True), family.shares[which]
        assert all(shares[x, y] > 0 for x, y in task.draw(8, NOISE))
        assert all(shares[x, y] == shares[x].max() for x, y in task.modes(8, NOISE))


def test_draws_come_as_often_as_the_task_says():
    """4,000 of an urn: the standard error of a share is at most 0.008."""
    task = Task(FAMILIES["urn"](NOISE), 5, True)
    drawn = np.bincount([y for _, y in task.draw(4000, NOISE)], minlength=3) / 4000
    assert drawn == pytest.approx(task.predictive([], 0), abs=0.035)


def test_a_task_is_a_function_of_seed_and_number_alone():
    """Whatever came before it, and how much of its noise was used."""
    long, short = (draw_tasks(("urn", "die"), n, told=0.5, seed=3) for n in (9, 5))
    long = [(task.description, task.draw(3, noise)) for task, noise in long]
    short = [(task.description, task.draw(3, noise)) for task, noise in short]
    assert long[:5] == short and len({str(task) for task in long}) == 9
    other = draw_tasks(("urn", "die"), 5, told=0.5, seed=4)
    assert short != [(task.description, task.draw(3, noise)) for task, noise in other]


def test_rows_and_questions_of_one_seed_are_drawn_apart():
    """What a model was tuned on is not what it is read by, but for equal draws."""
    rows = [row.pairs for row in make_rows(("numbers_100",), 16, pairs=9, told=0, seed=5)]
    asked = [q.history for q in make_questions(Asked(("numbers_100",), 16, (8,), 5)) if q.shots]
    assert not {pairs[:8] for pairs in rows} & {*asked}


# Tokens and the mask

WORDS = (
    *("<pad>", "<unk>", "<eos>", OPEN, CLOSE, "z", "in", "out", ";"),
    *("a", "toss", "first", "second", "heads", "tails", "red", "blue"),
)
WORDY = RowFormat(description="z %s ", input="in %s ", output="out", end=" ;")
ROW = Row("a toss", (("first", "heads"), ("", "red blue"), ("second", "tails")))


def test_the_mask_of_a_row_by_hand():
    """Outputs and their ends; not the first where nothing told the task."""
    writer = RowWriter(make_tokenizer(WORDS), WORDY)
    text = "z a toss in first out heads ; out red blue ; in second out tails ;".split()
    loss = [0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    for dropped in (False, True):
        found = row_example(ROW, writer, dropped=dropped, max_tokens=32)
        words, marks = (text[3:], [0] * 5 + loss[8:]) if dropped else (text, loss)
        ids = [WORDS.index(word) for word in words]
        assert found["input_ids"] == ids
        assert found["labels"] == [i if mark else NO_LOSS for i, mark in zip(ids, marks)]


def test_pairs_that_do_not_fit_are_left_out_whole():
    writer = RowWriter(make_tokenizer(WORDS), WORDY)
    for most, kept in ((17, 17), (16, 12), (12, 12), (11, 8)):
        found = row_example(ROW, writer, dropped=False, max_tokens=most)
        assert len(found["input_ids"]) == len(found["labels"]) == kept
    with pytest.raises(DataError, match="line 7: no output with a loss fits into 7 tokens"):
        row_example(ROW, writer, dropped=False, max_tokens=7, where="line 7")
    with pytest.raises(DataError, match="behind the first"):
        row_example(ROW, writer, dropped=True, max_tokens=8)


def slow_mask(rows: list[Row], dropped: list[bool]) -> list[list[str]]:
    """Words with a loss, read off the text: from behind `out` to `;`."""
    found = []
    for row, gone in zip(rows, dropped):
        pairs = [f"{f'in {x} ' if x else ''}out {y} ;" for x, y in row.pairs]
        outputs, inside = [], False
        for word in " ".join(pairs).split():
            inside = inside or word == "out"
            if inside and word != "out":
                outputs.append(word)
            inside = inside and word != ";"
        found.append(outputs[outputs.index(";") + 1 :] if gone else outputs)
    return found


def trainer_of(rows: list[Row], folder, **settings):
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    words = make_tokenizer(WORDS)
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_config(make_model_config(WORDS)),
        processing_class=words,
        args=trl.SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=4,
        ),
        train_dataset=Dataset.from_list(row_examples(rows, words, row_format=WORDY, **settings)),
    )


def test_what_trl_trains_on_is_what_a_slow_reader_finds(tmp_path):
    """Through its data set, its order and its own collator."""
    pairs = [("first", "heads"), ("", "red blue"), ("second", "tails"), ("", "blue")]
    rows = [Row("a toss", tuple(pairs[k % 4] for k in range(n, 2 * n + 2))) for n in range(8)]
    trainer = trainer_of(rows, tmp_path, drop=0.5, seed=1)
    dropped = [is_dropped(number, drop=0.5, seed=1) for number in range(8)]
    assert 0 < sum(dropped) < 8
    found = [
        [WORDS[label] for label in labels if label != NO_LOSS]
        for batch in trainer.get_train_dataloader()
        for labels in batch["labels"].tolist()
    ]
    assert sorted(found) == sorted(slow_mask(rows, dropped))


def test_one_pair_with_its_description_is_plain_sft(tmp_path):
    """The tokens and labels that TRL makes of the same as a prompt and its completion, which it
    ends with its end token."""
    import trl
    from datasets import Dataset

    words, ends = make_tokenizer(WORDS), replace(WORDY, end="<eos>")
    ours = row_examples([Row("a toss", (("", "red"),))], words, row_format=ends, drop=0)
    plain = [{"prompt": "z a toss out", "completion": " red"}]
    trainer = trainer_of([ROW], tmp_path, drop=0)
    theirs = trl.SFTTrainer(
        model=trainer.model,
        processing_class=words,
        args=trainer.args,
        train_dataset=Dataset.from_list(plain),
    ).train_dataset[0]
    assert ours == [{name: theirs[name] for name in ("input_ids", "labels")}]


def test_descriptions_are_dropped_at_the_rate():
    """4,000 lots: the standard error is 0.0063."""
    lots = [is_dropped(number, drop=0.2, seed=7) for number in range(4000)]
    assert np.mean(lots) == pytest.approx(0.2, abs=0.026)
    assert lots != [is_dropped(number, drop=0.2, seed=8) for number in range(4000)]
    assert not any(is_dropped(number, drop=0.0, seed=7) for number in range(100))


def test_a_drop_that_leaves_a_row_without_a_loss_is_refused():
    single = Row("a toss", (("", "red"),))
    with pytest.raises(ConfigError, match="1 of 2 rows have one pair"):
        row_examples([ROW, single], make_tokenizer(WORDS), row_format=WORDY)
    with pytest.raises(ConfigError, match="drop is a probability"):
        row_examples([ROW], make_tokenizer(WORDS), row_format=WORDY, drop=1.0)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"end": "\n"}, "format.end: the tokenizer makes no token of"),
        ({"end": " never"}, "format.end: the tokenizer makes <unk> of ' never'"),
        ({"end": ""}, "format.end must not be empty"),
        ({"input": "in "}, "format.input needs %s"),
    ],
)
def test_a_format_that_marks_no_end_is_refused(change, said):
    with pytest.raises(ConfigError) as told:
        RowWriter(make_tokenizer(WORDS), replace(WORDY, **change))
    assert said in str(told.value)


@pytest.mark.parametrize(
    "value, said",
    [
        ({"pairs": [["", "a"]]}, "description must be a text"),
        ({"description": "z", "pairs": []}, "at least one"),
        ({"description": "z", "pairs": "ab"}, "must be a list of"),
        ({"description": "z", "pairs": [["a"]]}, "a pair must be"),
        ({"description": "z", "pairs": [["", " "]]}, "a pair must be"),
        ({"description": "z", "pairs": [["", 3]]}, "a pair must be"),
    ],
)
def test_a_row_that_is_none_is_refused_with_its_place(value, said):
    with pytest.raises(DataError, match="rows.jsonl:3: ") as told:
        row_of(value, "rows.jsonl:3")
    assert said in str(told.value)


# Measures


def test_divergence_of_equal_ones_is_0_of_disjoint_ones_ln_2():
    half, third = np.array([0.5, 0.5, 0.0]), np.full(3, 1 / 3)
    assert divergence(half, half) == 0 and divergence(third, third) == 0
    assert divergence(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(math.log(2))
    assert divergence(half, third) == divergence(third, half)
    # Of (1, 0) and (1/2, 1/2): H(3/4, 1/4) - ln 2 / 2.
    by_hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    assert divergence(np.array([1.0, 0]), np.array([0.5, 0.5])) == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="two distributions"):
        divergence(np.array([0.5, 0.4]), np.array([0.5, 0.5]))


def test_missing_mass_is_told_and_does_not_change_the_divergence():
    """A model that says the right thing one time in a million is aligned, and useless."""
    truth = np.array([0.25, 0.75])
    found = np.log(truth * 1e-6)
    assert divergence(renormalized(found), truth) == pytest.approx(0, abs=1e-12)
    assert mass_of(found) == pytest.approx(1e-6)
    assert excess_nats(truth, found) == pytest.approx(math.log(1e6))
    assert renormalized(np.array([-2000.0, -2000.0])) == pytest.approx([0.5, 0.5])


def test_options_without_any_mass_are_refused_alone_and_counted_among_others():
    nothing = np.full(2, -np.inf)
    with pytest.raises(ConfigError, match="none of the 2 options has a probability"):
        renormalized(nothing)
    one, other = make_questions(Asked(("coin",), 1, (0,)))
    found = figures_of([one, one, other], [nothing, np.log(one.truth), np.log(other.truth)])
    assert found["undefined"] == 1 and found["told_mass"] == pytest.approx(0.5)
    assert found["told_jsd"] == 0


def test_an_option_that_the_model_excludes_costs_without_bound():
    """And that is not a number that JSON has."""
    (question, _) = make_questions(Asked(("coin",), 1, (0,)))
    question = replace(question, is_told=False)
    assert excess_nats(question.truth, np.array([0.0, -np.inf])) == math.inf
    found = figures_of([question], [np.array([0.0, -np.inf])])
    assert found["shots_0_excess"] is None and found["shots_0_nll"] is None
    assert found["undefined"] == 0 and found["shots_0_jsd"] > 0


def test_yield_by_hand():
    """Two draws of a fair coin show 1.5 different sides; what is not valid counts for none."""
    truth = np.array([0.5, 0.5, 0.0])
    assert expected_yield(truth, np.log([0.5, 0.5, 1e-300]), draws=2) == pytest.approx(1.5)
    assert expected_yield(truth, np.log([0.25, 0.25, 0.5]), draws=1) == pytest.approx(0.5)
    assert yield_of([" red\n", "red", "blue", "mauve"], ("red", "blue", "green")) == 2


def test_oracles_have_the_figures_that_they_must_have():
    """Bayes is 0 from itself; what is uniform of two options is ln 2 in nats, whatever is drawn."""
    asked = Asked(("coin", "urn"), 6, (0, 3))
    right, even = score_oracle(bayes, asked), score_oracle(uniform, asked)
    for name in ("told_jsd", "shots_0_excess", "shots_3_jsd", "shots_3_excess"):
        assert right["all"][name] == pytest.approx(0, abs=1e-12)
    assert even["coin"]["shots_3_nll"] == pytest.approx(math.log(2))
    assert even["urn"]["shots_3_nll"] == pytest.approx(math.log(3))
    assert even["coin"]["shots_0_excess"] == pytest.approx(0)
    assert right["coin"]["told_mass"] == pytest.approx(1)
    assert right["all"]["shots_3_accuracy"] >= even["all"]["shots_3_accuracy"]


# Scoring by a model


@pytest.fixture(scope="module")
def asked_model():
    """Random weights, and the words of three families."""
    from transformers import AutoModelForCausalLM

    from rlp.model.markers import Markers
    from rlp.model.policy import Policy

    rows = make_rows(("coin", "coins", "urn"), 300, pairs=4, told=0.5)
    texts = [" ".join([row.description, *(f"{x} {y}" for x, y in row.pairs)]) for row in rows]
    words = list(dict.fromkeys([*WORDS, *(word for text in texts for word in text.split())]))
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(make_model_config(words)).eval()
    markers = Markers(open=(words.index(OPEN),), close=(words.index(CLOSE),))
    return SimpleNamespace(policy=Policy(lm, markers), tokenizer=make_tokenizer(words))


def test_an_option_has_the_probability_of_its_tokens(asked_model: AskedModel):
    """At any temperature, and whatever is read beside it: against the model's own logits over each
    whole sequence. One option has two tokens and the other one."""
    questions = make_questions(Asked(("coin", "coins", "urn"), 2, (0, 1, 3)))
    questions.append(replace(questions[0], options=("red", "red blue"), truth=np.array([0.5, 0.5])))
    writer = RowWriter(asked_model.tokenizer, WORDY)
    temperatures = (1.0, 2.0)
    found = option_logprobs(asked_model.policy, writer, questions, temperatures)
    again = option_logprobs(asked_model.policy, writer, questions, temperatures, rows=1)
    for number, question in enumerate(questions):
        context = context_ids(writer, question)
        for place, option in enumerate(question.options):
            answer = writer.answer(option)
            ids = torch.tensor([context + answer])
            with torch.no_grad():
                logits = asked_model.policy.lm(input_ids=ids).logits[0].double()
            for temperature in temperatures:
                own = (logits / temperature).log_softmax(-1)[len(context) - 1 : -1]
                expected = own.gather(1, torch.tensor(answer)[:, None]).sum()
                assert found[temperature][number][place] == pytest.approx(float(expected), abs=1e-4)
                assert again[temperature][number][place] == pytest.approx(float(expected), abs=1e-4)


def test_options_of_the_same_tokens_are_refused(asked_model: AskedModel):
    question = replace(make_questions(Asked(("coin",), 1, (0,)))[0], options=("heads", " heads"))
    writer = RowWriter(asked_model.tokenizer, WORDY)
    with pytest.raises(ConfigError, match="two of its options have the same tokens"):
        option_logprobs(asked_model.policy, writer, [question])


def test_a_question_longer_than_the_model_reads_is_refused(asked_model: AskedModel):
    """256 positions; 64 pairs of four words each are as many alone."""
    writer = RowWriter(asked_model.tokenizer, replace(WORDY, output="out out"))
    with pytest.raises(ConfigError, match="after 64 pairs .* and the model reads 256"):
        option_logprobs(asked_model.policy, writer, make_questions(Asked(("coin",), 1, (64,))))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"families": ("urns",)}, "families must be different names among urn, coin"),
        ({"families": ()}, "got none"),
        ({"shots": (1, 1)}, "ascending"),
        ({"tasks": 0}, "tasks must be at least 1"),
    ],
)
def test_questions_that_can_not_be_asked_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        Asked(**change)


# The stage, the evaluation and the command


@pytest.fixture(scope="module")
def tuned(asked_model: AskedModel, tmp_path_factory):
    """A model folder, a file of rows, and the stage."""
    tmp_path = tmp_path_factory.mktemp("tuned")
    asked_model.policy.lm.save_pretrained(tmp_path / "base")
    asked_model.tokenizer.save_pretrained(tmp_path / "base")
    rows = f"spectrum rows --out {tmp_path}/rows.jsonl --rows 16 --pairs 4 --families coin,urn"
    assert main(rows.split()) == 0
    settings = SpectrumStage(
        kind="spectrum",
        data=[str(tmp_path / "rows.jsonl")],
        steps=4,
        batch_size=4,
        learning_rate=1e-3,
        checkpoint_every=1,
        keep_steps=[2],
        format=WORDY,
    )
    (tmp_path / "stage").mkdir()
    return Work(settings, 0, str(tmp_path / "base"), tmp_path / "stage", start_ranks())


@pytest.fixture(scope="module")
def made(tuned: Work) -> Made:
    """What the stage made, undisturbed."""
    return tune(tuned)


def test_the_stage_trains_keeps_its_models_and_counts_its_loss(tuned: Work, made: Made):
    """All 16 rows once; with a loss are two tokens of each pair, but for the first of a row without
    its description."""
    assert [kept.step for kept in made.kept] == [2, 4]
    assert made.spent.optimizer_steps == 4
    lots = sum(is_dropped(number, drop=0.2, seed=0) for number in range(16))
    ledger = read_json(made.kept[-1].path / "ledger.json")["state"]
    assert ledger["phases"]["lm"]["tokens_trained"] == 2 * (16 * 4 - lots)
    told = read_spectrum(
        Reading(
            model=made.kept[-1].path,
            seed=0,
            temperature=1.0,
            start=tuned.model,
            is_last=True,
            settings={"families": ["coin"], "tasks": 2, "shots": [1], "format": vars(WORDY)},
            folder=tuned.folder,
            ranks=tuned.ranks,
        )
    )
    assert 0 < told["spectrum_told_mass"] < 1 and told["spectrum_coin_shots_1_excess"] > 0
    assert EVALUATIONS["spectrum"].endswith("read_spectrum")


def test_a_stage_that_was_stopped_ends_as_one_that_was_not(
    tuned: Work, made: Made, tmp_path, monkeypatch
):
    """Weights bit for bit: rows, their order and the dropped descriptions are the same again."""
    other = replace(tuned, folder=tmp_path / "other")
    other.folder.mkdir()
    steps = itertools.count(1)

    def fault(point: str) -> None:
        if point == "stage.after_step" and next(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("rlp.post.stages.trl_training.fault", fault)
    with pytest.raises(KeyboardInterrupt):
        tune(other)
    assert [path.name for path in other.models.iterdir()] == ["step_2"]
    tune(other)
    for kept in made.kept:
        again = other.models / f"step_{kept.step}" / "model.safetensors"
        assert (kept.path / again.name).read_bytes() == again.read_bytes()


def test_a_pipeline_has_the_stage_in_its_usual_words(tmp_path):
    """The frames of a row hold nothing that a pipeline would fill in."""
    stage = "{kind: spectrum, data: [rows.jsonl], steps: 2, learning_rate: 1e-5}"
    text = f"dir: d\nmodel: m\nseeds: [0]\nstages: {{tune: {stage}}}\narms: {{tuned: [tune]}}\n"
    (tmp_path / "pipeline.yaml").write_text(text)
    settings = load_pipeline(tmp_path / "pipeline.yaml").stages["tune"]
    assert settings.format == RowFormat() and settings.drop == 0.2
    (tmp_path / "pipeline.yaml").write_text(text.replace("learning", "drop: 1, learning"))
    with pytest.raises(ConfigError, match="stages.tune: drop must be from 0 on, below 1, got 1"):
        load_pipeline(tmp_path / "pipeline.yaml")


def test_a_row_is_not_read_twice(tuned: Work):
    more = replace(tuned.settings, steps=5)
    with pytest.raises(ConfigError, match="16 rows, and 5 steps of 4 read 20"):
        read_rows(more)


def test_an_evaluation_that_can_not_be_made_is_refused():
    with pytest.raises(ConfigError, match="unknown key task. There are families, tasks"):
        open_spectrum({"task": 1})
    with pytest.raises(ConfigError, match="spectrum.format: unknown key stop"):
        open_spectrum({"format": {"stop": "x"}})


def test_the_command_tells_a_checkpoint_beside_the_oracles(tuned: Work, tmp_path, capsys):
    frames = ["--description-format", "z %s ", "--input-format", "in %s "]
    frames += ["--output-format", "out", "--end-format", " ;"]
    score = f"spectrum score {tuned.model} --families coin --tasks 2 --shots 0,2"
    out = tmp_path / "scores.json"
    assert main([*score.split(), "--temperatures", "1,2", "--json", str(out), *frames]) == 0
    said = capsys.readouterr().out
    assert "T 2" in said and "Bayes" in said and "above Bayes" in said
    told = json.loads(out.read_text())
    assert [one["temperature"] for one in told["temperatures"]] == [1.0, 2.0]
    assert told["oracles"]["uniform"]["coin"]["shots_2_nll"] == pytest.approx(math.log(2))
    assert main([*score.split()]) == 2  # the usual end is no word of this tokenizer
    assert "format.output: the tokenizer makes" in capsys.readouterr().err


def test_rows_are_not_written_over(tuned: Work, tmp_path, capsys):
    command = f"spectrum rows --out {tuned.settings.data[0]} --rows 2".split()
    assert main(command) == 2 and "exists" in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path / "new.jsonl"), "--rows", "0"]) == 2
    assert "rows must be at least 1" in capsys.readouterr().err


def test_a_disk_that_fills_leaves_no_rows(tmp_path, monkeypatch):
    def fault(point, first=None):
        if point == "spectrum.torn_rows":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlp.process.files.fault", fault)
    with pytest.raises(OSError, match="No space left"):
        write_rows(tmp_path / "rows.jsonl", make_rows(("coin",), 3, pairs=2, told=0.5))
    assert list(tmp_path.iterdir()) == []

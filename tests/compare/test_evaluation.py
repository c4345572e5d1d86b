"""Benchmarks: a thought, then the answer; keyed noise; checks in processes that can be killed;
lm_eval's own numbers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlp.cli import main
from rlp.compare import tasks
from rlp.compare.answers import AnswerPool, Verdict
from rlp.compare.benchmarks import mean_and_error, run_benchmark
from rlp.compare.harness import thinking_lm
from rlp.compare.tasks import Benchmark, load_benchmarks, settle_samples
from rlp.compare.thinker import Reply, Thinker
from rlp.config import ConfigError, ThoughtConfig
from rlp.data.sources import open_rows
from rlp.model.markers import Markers
from rlp.model.thoughts import ThoughtFormat
from rlp.sampling.native import NativeSampler
from tests import REPOSITORY
from tests.compare.answer_checks import dies_on_three, hangs_on_three
from tests.tiny_models import tiny_policy

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
pytest.importorskip("math_verify", reason="math-verify is not installed (extra eval)")

GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k"
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w2 w2", "w11 w12 w13 w14"]
OPEN, CLOSE = 2, 3


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture(scope="module")
def pool():
    with AnswerPool(workers=2, timeout_s=30) as pool:
        yield pool


def thinker_of(
    policy,
    tokenizer,
    *,
    thinks: bool,
    budget: int = 6,
    answer_temperature: float = 0.0,
    rows: int = 4,
    temperature: float = 1.0,
) -> Thinker:
    thought_format = ThoughtFormat(
        markers=Markers(open=(OPEN,), close=(CLOSE,)),
        instruction=(),
        begin=None,
        temperature=temperature,
        target_temperature=1.0,
        horizon=1,
    )
    return Thinker(
        policy,
        NativeSampler(policy, slots=rows),
        tokenizer,
        thought_format,
        thinks=thinks,
        thought_tokens=budget,
        answer_temperature=answer_temperature,
        rows=rows,
    )


def greedy_answer(policy, tokens: list[int], budget: int) -> list[int]:
    """Full forwards, one sequence, no cache; the open marker is never written."""
    tokens, written = list(tokens), []
    for _ in range(budget):
        with torch.no_grad():
            logits = policy.lm(input_ids=torch.tensor([tokens])).logits[0, -1]
        logits[OPEN] = -torch.inf
        written.append(int(logits.argmax()))
        tokens.append(written[-1])
        if written[-1] == 1:
            return written[:-1]
    return written


def logprob_of(policy, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = (
            policy.lm(input_ids=torch.tensor([context + continuation]))
            .logits[0, len(context) - 1 : -1]
            .double()
        )
    logits[:, OPEN] = -torch.inf
    return float(logits.log_softmax(dim=1).gather(1, torch.tensor(continuation)[:, None]).sum())


def requests_of(kind: str, arguments: list[tuple], repeats: int = 1) -> list:
    from lm_eval.api.instance import Instance

    return [
        request
        for index, one in enumerate(arguments)
        for request in [Instance(kind, {}, one, index, ("t", index, repeats))] * repeats
    ]


def test_a_greedy_answer_is_the_models_own(policy, tokenizer):
    """Batches padded on the left, with a cache, write what one full forward after the other
    writes."""
    replies = thinker_of(policy, tokenizer, thinks=False).replies(
        PROMPTS, 1, until=[], answer_tokens=8
    )
    expected = [
        tokenizer.decode(
            greedy_answer(policy, tokenizer.encode(prompt), 8), skip_special_tokens=True
        )
        for prompt in PROMPTS
    ]
    assert [reply.answer for (reply,) in replies] == expected
    assert len(set(expected)) > 1
    assert {(reply.thought, reply.thought_tokens) for (reply,) in replies} == {("", 0)}


def test_an_answer_continues_the_closed_thought(policy, tokenizer):
    """Prompt, open marker, thought, close marker (forced where the budget ends the thought),
    answer."""
    replies = thinker_of(policy, tokenizer, thinks=True, budget=12).replies(
        PROMPTS, 8, until=[], answer_tokens=5
    )
    flat = [(prompt, reply) for prompt, group in zip(PROMPTS, replies) for reply in group]
    assert 0 < sum(reply.thought_truncated for _, reply in flat) < len(flat)
    for prompt, reply in flat:
        thought = tokenizer.encode(reply.thought)
        assert len(thought) == reply.thought_tokens - (not reply.thought_truncated)
        assert reply.thought_tokens == 12 if reply.thought_truncated else CLOSE not in thought
        context = [*tokenizer.encode(prompt), OPEN, *thought, CLOSE]
        assert reply.answer == tokenizer.decode(
            greedy_answer(policy, context, 5), skip_special_tokens=True
        )


def test_answers_depend_on_neither_batch_nor_company(policy, tokenizer):
    """Noise is keyed by prompt and sample."""

    def ask(prompts: list[str], rows: int) -> dict:
        thinker = thinker_of(policy, tokenizer, thinks=True, answer_temperature=1.0, rows=rows)
        return dict(zip(prompts, thinker.replies(prompts, 3, until=[], answer_tokens=6)))

    together = ask(PROMPTS, 64)
    assert ask(PROMPTS[::-1], 2) == together
    assert ask(PROMPTS[2:3], 1) == {PROMPTS[2]: together[PROMPTS[2]]}
    assert all(len({reply.thought for reply in group}) > 1 for group in together.values())
    assert all(len({reply.answer for reply in group}) > 1 for group in together.values())


def test_answers_that_have_ended_leave_the_others_as_they_are(policy, tokenizer):
    """A word of eleven among 48 ends an answer: rows are taken by others, or given up, at any
    time."""

    def ask(rows: int) -> list[list[Reply]]:
        thinker = thinker_of(policy, tokenizer, thinks=False, answer_temperature=1.0, rows=rows)
        return thinker.replies(PROMPTS, 4, until=["w1"], answer_tokens=12)

    one_by_one = ask(1)
    assert ask(5) == one_by_one and ask(64) == one_by_one
    assert len({reply.answer_tokens for group in one_by_one for reply in group}) > 3


def test_an_answer_ends_before_a_stop_text(policy, tokenizer):
    thinker = thinker_of(policy, tokenizer, thinks=False)
    whole = thinker.replies(PROMPTS[:1], 1, until=[], answer_tokens=12)[0][0]
    stop = whole.answer.split()[4]
    cut = thinker.replies(PROMPTS[:1], 1, until=["nowhere", stop], answer_tokens=12)[0][0]
    assert cut.answer == whole.answer[: whole.answer.index(stop)]
    assert whole.answer_truncated and not cut.answer_truncated
    assert cut.answer_tokens < whole.answer_tokens


def test_white_space_after_a_thought_ends_no_answer(policy, tokenizer):
    """Post-trained models write a blank line after a thought, and a task may stop at a line's
    end."""
    assert thinker_of(policy, tokenizer, thinks=True)._cut("\n\nB\nmore", ["\n"]) == "\n\nB"
    assert thinker_of(policy, tokenizer, thinks=False)._cut("\n\nB\nmore", ["\n"]) == ""


def test_a_greedy_thought_is_the_models_own(policy, tokenizer):
    """Temperature 0 of a benchmark is the most probable thought."""
    from rlp.compare.asked_model import AskedModel

    thought_format = thinker_of(policy, tokenizer, thinks=True)._thought_format
    evaluator = AskedModel(policy, tokenizer, thought_format, ThoughtConfig(max_thought_tokens=5))
    greedy = Benchmark(task="t", thought_temperature=0.0)
    thinker = evaluator.thinker(greedy, thinks=True, seed=0, rows=4)
    reply = thinker.replies(PROMPTS[:1], 1, until=[], answer_tokens=1)[0][0]
    tokens = [*tokenizer.encode(PROMPTS[0]), OPEN]
    for token in tokenizer.encode(reply.thought):
        with torch.no_grad():
            assert token == int(policy.lm(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)


@pytest.mark.parametrize("thinks", [False, True])
def test_a_loglikelihood_is_that_of_a_direct_computation(policy, tokenizer, thinks: bool):
    """Temperature 1, the open marker left out; all choices of a question are scored after the same
    thought."""
    lm = thinking_lm(thinker_of(policy, tokenizer, thinks=thinks))
    pairs = [("w1 w2", " w3 w4"), ("w1 w2", " w5"), ("w7 w8 w9 ", "w1")]
    scored = lm.loglikelihood(requests_of("loglikelihood", pairs, 2))
    for index, (context, continuation) in enumerate(pair for pair in pairs for _ in range(2)):
        reply = lm.replies[index]
        before = tokenizer.encode(context) + (
            [OPEN, *tokenizer.encode(reply.thought), CLOSE] if thinks else []
        )
        after = tokenizer.encode(continuation)
        assert scored[index][0] == pytest.approx(logprob_of(policy, before, after), abs=1e-4)
        assert scored[index][1] == (greedy_answer(policy, before, len(after)) == after)
    thoughts = [reply.thought for reply in lm.replies]
    assert thoughts[0] == thoughts[2] and thoughts[1] == thoughts[3]
    assert (thoughts[0] != thoughts[1]) == thinks


def test_a_rolling_loglikelihood_never_thinks(policy, tokenizer):
    lm = thinking_lm(thinker_of(policy, tokenizer, thinks=True))
    assert lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(PROMPTS[2],)])) == [
        pytest.approx(logprob_of(policy, [1], tokenizer.encode(PROMPTS[2])), abs=1e-4)
    ]


def test_lm_eval_itself_finds_the_same_accuracy(policy, tokenizer, pool, tmp_path: Path):
    """A multiple choice, asked by our loop and by lm_eval's evaluator."""
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    generator = np.random.default_rng(0)
    (tmp_path / "choices.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "q": " ".join(f"w{i}" for i in generator.integers(0, 40, size=4)),
                    "right": int(generator.integers(3)),
                }
            )
            + "\n"
            for _ in range(12)
        )
    )
    spec = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "choices.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["w1", "w2", "w3 w4"],
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }
    loaded = TaskManager(include_defaults=False).load([spec])
    thinker = thinker_of(policy, tokenizer, thinks=True)
    theirs = lm_eval.evaluator.evaluate(thinking_lm(thinker), loaded, bootstrap_iters=0)["results"][
        "choices"
    ]["acc,none"]
    ours, rows = run_benchmark(
        "choices",
        Benchmark(task="choices", samples=3),
        list(loaded["tasks"].values()),
        thinker,
        pool,
        mode="think",
        limit=None,
    )
    assert np.mean([row["score"] for row in rows if row["sample"] == 0]) == theirs
    assert ours.accuracy == pytest.approx(np.mean([row["score"] for row in rows]))
    assert ours.metric == "acc" and (ours.questions, len(rows)) == (12, 36)
    assert 0 < theirs < 1


def written_task(folder: Path, **more: object) -> dict:
    """A task of lm_eval that reads files: a written answer after two examples, which are drawn."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 7)):
        lines = [
            json.dumps({"q": " ".join(f"w{i}" for i in generator.integers(0, 40, size=size))})
            for size in generator.integers(2, 9, size=count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return {
        "task": "written",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
        },
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": 2,
        "output_type": "generate_until",
        "doc_to_text": "{{q}} .",
        "doc_to_target": "w2",
        "generation_kwargs": {"until": ["w7"], "max_gen_toks": 12, "do_sample": False} | more,
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {
                "name": "first",
                "filter": [
                    {"function": "regex", "regex_pattern": "(w[12])"},
                    {"function": "take_first"},
                ],
            }
        ],
    }


def test_plain_lm_eval_on_the_same_folder_gives_the_same_answers(policy, tokenizer, pool, tmp_path):
    """Problem by problem, in prompts and to the letter: lm_eval's own model of transformers, told
    to leave the open marker out, and ours without thoughts. With thoughts the prompts are the same
    too (examples that are drawn are drawn alike in both modes), and so are the answers to prompts
    that end in the thoughts."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    spec = written_task(tmp_path, suppress_tokens=[OPEN])
    manager = TaskManager(include_defaults=False)
    plain = HFLM(pretrained=policy.lm, tokenizer=tokenizer, batch_size=3, device="cpu")
    theirs = lm_eval.evaluator.simple_evaluate(
        plain, tasks=[spec], task_manager=manager, bootstrap_iters=0
    )
    expected = [
        (sample["arguments"][0][0], sample["resps"][0][0], sample["exact_match"])
        for sample in sorted(theirs["samples"]["written"], key=lambda sample: sample["doc_id"])
    ]

    loaded, said = list(manager.load([spec])["tasks"].values()), {}
    for mode in ("think", "no_think"):
        thinker = thinker_of(policy, tokenizer, thinks=mode == "think")
        asked = Benchmark(task="written")
        result, rows = run_benchmark("written", asked, loaded, thinker, pool, mode=mode, limit=None)
        said[mode] = [(row["prompt"], row["answer"], row["score"]) for row in rows]
        if mode == "think":
            prompts = [f"{row['prompt']} <think> {row['thought']} </think>" for row in rows]

    assert said["no_think"] == expected
    assert 0 < result.accuracy == theirs["results"]["written"]["exact_match,first"] < 1
    assert [prompt for prompt, *_ in said["think"]] == [prompt for prompt, *_ in expected]
    assert len({answer for _, answer, _ in expected}) > 3

    asked = [(prompt, spec["generation_kwargs"]) for prompt in prompts]
    after = plain.generate_until(requests_of("generate_until", asked), disable_tqdm=True)
    assert after == [answer for _, answer, _ in said["think"]] and len(set(after)) > 3


def test_pass_at_1_is_the_mean_over_samples_and_its_error_is_over_questions():
    """Two samples of one question are no two questions."""
    accuracy, error = mean_and_error(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert (accuracy, error) == (pytest.approx(0.5), pytest.approx(0.5 / 3**0.5))
    assert mean_and_error(np.array([[1.0, 0.0]])) == (0.5, None)


def test_what_is_not_drawn_is_answered_once():
    assert settle_samples(Benchmark(task="t", samples=8), "no_think").samples == 1
    assert (
        settle_samples(Benchmark(task="t", samples=8, thought_temperature=0.0), "think").samples
        == 1
    )
    assert settle_samples(Benchmark(task="t", samples=8), "think").samples == 8
    assert (
        settle_samples(Benchmark(task="t", samples=8, answer_temperature=0.7), "no_think").samples
        == 8
    )


def test_equal_mathematics_is_a_right_answer(pool):
    right, wrong, nothing = (
        Verdict(True, "checked"),
        Verdict(False, "checked"),
        Verdict(False, "unparseable"),
    )
    cases = [
        ("1/2", "0.5", right),
        (r"so it is $\frac{1}{2}$.", "0.5", right),
        ("0.5", r"\frac{1}{2}", right),
        (r"\boxed{x^2+1}", "1+x^2", right),
        ("5 + 13 = 18\n#### 18", "He has 9 * 2 = 18.\n#### 18", right),
        ("#### 70,000", "#### 70000", right),
        (r"$4.5\times 10^{33}$", "4.5e33", right),
        ("Evelyn", "Evelyn", right),
        ("#### 17", "#### 18", wrong),
        ("the 18 is not what follows #### 3", "18", wrong),
        ("1", "x^2+1", wrong),
        ("no idea", "18", nothing),
        ("", "18", nothing),
    ]
    assert pool.verdicts([(answer, reference) for answer, reference, _ in cases]) == [
        verdict for *_, verdict in cases
    ]


@pytest.mark.parametrize("check, outcome", [(hangs_on_three, "timeout"), (dies_on_three, "crash")])
def test_a_check_that_never_ends_costs_one_answer(check, outcome: str):
    """Its process is killed, and the answers after it are checked in another."""
    with AnswerPool(workers=2, timeout_s=2, check=check) as pool:
        pool.verdicts([("1", "1"), ("1", "1")])
        start = time.monotonic()
        verdicts = pool.verdicts([*[("3", "3")] * 2, *[("4", "4")] * 6])
        took = time.monotonic() - start
    assert verdicts == [*[Verdict(False, outcome)] * 2, *[Verdict(True, "checked")] * 6]
    assert took < 20


def test_the_papers_benchmarks_are_tasks_of_lm_eval():
    """Read strictly; only the index of the folders that they come from is built, without
    network."""
    import lm_eval.tasks

    benchmarks = load_benchmarks(REPOSITORY / "configs" / "benchmarks_paper.yaml")
    assert list(benchmarks) == [
        "AIME25",
        "MATH500",
        "GSM8K",
        "AMC23",
        "Minerva",
        "MMLU",
        "MMLU@1[4]",
        "MMLU-Pro",
        "MMLU-Pro@1[4]",
        "GPQA",
        "GPQA@1[4]",
    ]
    home = Path(lm_eval.tasks.__file__).parent
    folders = (
        "aime",
        "hendrycks_math",
        "gsm8k",
        "mmlu/generative",
        "mmlu_pro",
        "gpqa/cot_zeroshot",
    )
    known = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[home / folder for folder in folders]
    ).all_tasks
    assert {benchmark.task for benchmark in benchmarks.values() if benchmark.task} - set(
        known
    ) == set()
    assert {name: benchmark.samples for name, benchmark in benchmarks.items()} == dict.fromkeys(
        list(benchmarks)[:5], 8
    ) | {name: 4 if "@" in name else 1 for name in list(benchmarks)[5:]}
    greedy = {
        name
        for name, benchmark in benchmarks.items()
        if benchmark.thought_temperature == benchmark.answer_temperature == 0
    }
    assert greedy == {"MMLU", "MMLU-Pro", "GPQA"}


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("benchmarks: {a: {task: gsm8k, shot: 3}}", "unknown key shot. Did you mean shots"),
        ("benchmarks: {a: {task: gsm8k, samples: 0}}", "samples must be at least 1"),
        ("benchmarks: {a: {}}", "exactly one of them"),
        ("benchmarks: {a: {task: gsm8k, samples: many}}", "samples"),
        ("tasks: [gsm8k]", "one section"),
        ("benchmarks: {a: {data: x.jsonl, shots: 2}}", "needs examples"),
        ("benchmarks: {a: {task: gsm8k, check: maths}}", "must be one of task, math"),
    ],
)
def test_a_wrong_benchmark_file_is_refused(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ConfigError, match=complaint.replace(".", r"\.")):
        load_benchmarks(tmp_path / "b.yaml")


def test_examples_come_from_a_split_of_their_own(tmp_path, monkeypatch):
    """Those of the tested split would show the answers that are asked for."""
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    opened = []

    def open_split(sources: list[str], config: object, split: str, key: str):
        opened.append((sources, split))
        return open_rows([str(tmp_path / "q.jsonl")], config, split, key)

    monkeypatch.setattr(tasks, "open_rows", open_split)
    benchmark = load_benchmarks(REPOSITORY / "configs" / "benchmarks_gsm8k.yaml")["GSM8K"]
    tasks.own_task("GSM8K", benchmark)
    assert opened == [(["hub:openai/gsm8k@main"], split) for split in ("test", "train")]


@pytest.fixture(scope="module")
def gsm8k_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of GSM8K, by the tiny experiment's own command."""
    if not (GSM8K / "train.jsonl").is_file():
        pytest.skip(f"GSM8K is not at {GSM8K}")
    source, folder = (
        tmp_path_factory.mktemp("made") / "model",
        tmp_path_factory.mktemp("gsm8k") / "model",
    )
    subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "experiments" / "gsm8k_tiny" / "make_model.py"),
            "--data",
            str(GSM8K / "train.jsonl"),
            "--out",
            str(source),
        ],
        check=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not (GSM8K / "test.jsonl").is_file(), reason=f"GSM8K is not at {GSM8K}")
def test_gsm8k_from_its_file_end_to_end(
    gsm8k_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, rows = tmp_path / "results.json", tmp_path / "rows.jsonl"
    command = [
        "eval",
        str(gsm8k_model),
        "--tasks",
        str(GSM8K / "test.jsonl"),
        "--examples",
        str(GSM8K / "train.jsonl"),
        "--shots",
        "1",
        "--limit",
        "4",
        "--samples",
        "2",
        "--thought-budget",
        "6",
        "--answer-tokens",
        "8",
        "--device",
        "cpu",
        "--json",
        str(out),
        "--rows",
        str(rows),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    think, no_think = json.loads(out.read_text())["results"]
    assert (think["mode"], think["questions"], think["samples"]) == ("think", 4, 2)
    assert (no_think["mode"], no_think["questions"], no_think["samples"]) == ("no_think", 4, 1)
    assert 0 < think["thought_tokens_mean"] <= 6 and no_think["thought_tokens_mean"] == 0
    said = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(said) == 4 * 2 + 4
    assert all(
        row["prompt"].count("Question:") == 2
        and "####" in row["prompt"]
        and row["prompt"].endswith("Answer:")
        for row in said
    )
    assert said[0]["reference"].endswith("#### 18") and "Janet" in said[0]["prompt"]
    assert "pass@1 %" in printed and printed.count("4 x 2") == 1 and "difference" in printed
    assert "no verdict: 4 questions" in printed
    before = out.read_text()
    assert main(command) == 2 and out.read_text() == before


def test_what_can_not_be_downloaded_is_said_in_a_line(
    gsm8k_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Exit code 3, before the model is asked anything."""
    (tmp_path / "b.yaml").write_text("benchmarks: {AMC23: {data: 'hub:math-ai/amc23'}}")
    assert main(["eval", str(gsm8k_model), "--config", str(tmp_path / "b.yaml")]) == 3
    error = capsys.readouterr().err.strip()
    assert (
        error.startswith("rlp: AMC23: the data of hub:math-ai/amc23 can not be loaded")
        and "\n" not in error
    )
    assert main(["eval", str(gsm8k_model), "--tasks", "nowhere.jsonl"]) == 3

"""Run folders made by hand."""

from rlp.config import BudgetConfig, Config, DataConfig, ModelConfig, RunConfig, to_yaml
from rlp.process.json_files import write_json
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import append_json_line

PANEL = {
    "gain_over_start_nats": -0.5,
    "gain_over_ema_nats": -0.5,
    "gain_over_no_think_nats": -0.5,
    "positive_gain_frac": 0.25,
    "accuracy_with_thought": 0.125,
    "accuracy_without_thought": 0.5,
    "thought_tokens_mean": 12.0,
    "panel_positions": 64,
}


def make_thought(step, reward, **changes):
    thought = {
        "step": step,
        "document": 3,
        "position": 5,
        "prefix_tail": "two plus two is",
        "thought": f"thinking {reward}",
        "target": " four",
        "reasoned_logprob": -1.0,
        "baseline_logprob": None if reward is None else -1.0 - reward,
        "reward": reward,
        "advantage": reward,
        "thought_tokens": 4,
        "truncated": False,
    }
    return thought | changes


def _finish(folder: RunFolder, *, steps: int, after: float, seed: int) -> None:
    """Write what a run writes at its end."""
    count = {
        "tokens_in": 1234,
        "tokens_generated": 56,
        "tokens_trained": 7,
        "flops": 2.5e12,
        "seconds": 3.0,
    }
    write_json(
        folder.ledger_json,
        {
            "phases": {"decode": count},
            "input_tokens": 5000 + seed,
            "flops": 2.5e12,
            "paper_flops": 99000.0,
            "seconds": 3.0,
        },
        point="end.torn_ledger",
    )
    write_json(
        folder.summary_json,
        {
            "before": PANEL,
            "after": PANEL | {"gain_over_start_nats": after},
            "steps": steps,
            "seconds": 3.0,
            "flops": 2.5e12,
        },
        point="end.torn_summary",
    )


def make_run(path, steps=30, finished=True, thoughts=(), *, after=0.75, seed=0, arm=""):
    """A folder as a run leaves it; unfinished, as one leaves it that was killed. Without steps
    there is nothing to plot, which is quick."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    config = Config(
        run=RunConfig(dir=str(path), seed=seed, arm=arm),
        model=ModelConfig(path="tiny"),
        data=DataConfig(train=["corpus.jsonl"]),
        budget=BudgetConfig(steps=30),
    )
    folder.config_yaml.write_text(to_yaml(config))
    for step in range(1, steps + 1):
        append_json_line(
            folder.metrics_jsonl,
            {
                "step": step,
                "reward/mean": step / 10,
                "optim/grad_norm": 1.0,
                "budget/tokens": 10 * step,
                "budget/flops": 1e9 * step,
            },
        )
        append_json_line(folder.timing_jsonl, {"step": step, "perf/step_s": 0.5 + seed})
    for thought in thoughts:
        append_json_line(folder.thoughts_jsonl, thought)
    for step, gain in ((0, -0.5), (steps, after)) if steps else ():
        append_json_line(
            folder.evaluation_jsonl, {"step": step, **PANEL, "gain_over_start_nats": gain}
        )
    if finished:
        _finish(folder, steps=steps, after=after, seed=seed)
    return path

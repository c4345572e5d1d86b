"""What the tests run on two ranks, all in one launch: python -m tests.whole.two_ranks FOLDER
MODEL CORPUS

Each job is a run in FOLDER/NAME; the tests read the run folders and compare them with runs on one
rank.
"""

import json
import sys
from pathlib import Path

from torch.distributed import distributed_c10d

from rlp.process.exit_codes import DONE
from rlp.process.ranks import Ranks, start_ranks, stop_ranks
from tests.training import tiny_config, train

BY_LENGTH = {
    "budget__steps": 2,
    "data__max_document_tokens": 16,
    "optim__tokens_per_micro_batch": 70,
}
WATCHDOG_S = 2400.0
"""More than the default of any backend."""

JOBS = {
    "stage0": {"engine__zero_stage": 0},
    "stage1": {
        "engine__zero_stage": 1,
        "budget__steps": 4,
        "checkpoint__every_n_steps": 2,
        "checkpoint__keep": 3,
    },
    "stage2": {"engine__zero_stage": 2},
    # Thoughts end where they end: ranks decode different numbers of tokens, and a forward is a
    # collective.
    "stage3": {
        "engine__zero_stage": 3,
        "data__held_out": "CORPUS",
        "evaluation__panel_positions": 7,
    },
    "stage3_synced": {
        "engine__zero_stage": 3,
        "engine__generation": "synced",
        "position__per_document": "all",
        "sampling__slots": 8,
    },
    "stage3_markers": {
        "engine__zero_stage": 3,
        "budget__steps": 1,
        "thought__open_marker": "<pad> w1",
        "thought__close_marker": "<pad> w2",
        "thought__add_markers": True,
    },
    # Both exchange the positions of the step: a rank's first gets what the last of the other has.
    "shuffled": {
        "reward__placebo": "shuffled_reward",
        "budget__steps": 2,
        "optim__micro_batch_size": 1,
    },
    "foreign": {
        "reward__placebo": "foreign_thought",
        "budget__steps": 2,
        "optim__micro_batch_size": 1,
    },
    # Some documents go in slices on one rank and not on the other, and ranks have passes of other
    # numbers until they agree.
    "stage1_by_length": {"engine__zero_stage": 1, **BY_LENGTH},
    "stage2_by_length": {"engine__zero_stage": 2, **BY_LENGTH},
    "stage3_by_length": {
        "engine__zero_stage": 3,
        "reward__placebo": "shuffled_reward",
        "position__selector": "surprisal",
        **BY_LENGTH,
    },
    "masked": {
        "data__train": "MASKED",
        "data__tokens_field": "tokens",
        "data__loss_field": "loss_spans",
        "objective__policy_weight": 0.0,
        "objective__lm_weight": 1.0,
    },
    "stage1_bf16": {"engine__zero_stage": 1, "engine__dtype": "bfloat16"},
}


def main(folder: Path, model: Path, corpus: Path) -> None:
    ranks = start_ranks(WATCHDOG_S)
    files = {"CORPUS": corpus, "MASKED": folder / "masked.jsonl"}
    for name, settings in JOBS.items():
        settings = {
            key: f"[{files[value]}]" if value in files else value for key, value in settings.items()
        }
        (folder / f"rank{ranks.rank}").mkdir(exist_ok=True)
        config = tiny_config(folder / f"rank{ranks.rank}" / name, model, corpus, **settings)
        config.run.dir = str(folder / name)
        assert train(config, ranks) == DONE, name
    resumed = tiny_config(
        folder / f"rank{ranks.rank}" / "resumed",
        model,
        corpus,
        run__resume=folder / "one_rank" / "checkpoints" / "step_2",
        engine__zero_stage=2,
        budget__steps=4,
    )
    resumed.run.dir = str(folder / "resumed")
    assert train(resumed, ranks) == DONE
    (folder / f"waits_{ranks.rank}.json").write_text(json.dumps(waits_s(ranks)))
    stop_ranks()


def waits_s(ranks: Ranks) -> list[float]:
    """How long a collective waits, in seconds, in each process group of this process."""
    return [
        group._get_backend(ranks.device).options._timeout.total_seconds()
        for group in distributed_c10d._world.pg_map
    ]


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))

"""A run through vLLM at each of two stages, on as many ranks as there are: python -m
tests.vllm.two_ranks FOLDER MODEL CORPUS"""

import sys
from pathlib import Path

from rlp.process.exit_codes import DONE
from rlp.process.ranks import start_ranks, stop_ranks
from tests.training import tiny_config, train

STAGES = (1, 3)


def main(folder: Path, model: Path, corpus: Path) -> None:
    ranks = start_ranks()
    for stage in STAGES:
        config = tiny_config(
            folder / f"stage{stage}",
            model,
            corpus,
            sampling__engine="vllm",
            engine__zero_stage=stage,
            engine__generation="synced",
        )
        assert train(config, ranks) == DONE
    stop_ranks()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

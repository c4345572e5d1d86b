"""RLP, from config to exported model (arXiv 2510.01265, version 2, Algorithm 1).

    deepspeed train.py configs/quickstart.yaml [section.key=value ...]
    python train.py configs/quickstart.yaml --dry-run

The algorithm is in `rlp/algorithm.py`, the loop around it in `rlp/trainer.py`.
"""

from rlp.train import main, start

__all__ = ["main"]

if __name__ == "__main__":
    start()

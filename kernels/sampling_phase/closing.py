"""How `generate` of transformers is made to end its rows where they are recorded to end."""

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from update_step.given import CLOSE


class Closing(LogitsProcessor):
    """Makes the close marker certain for the last token of each row; one operator a token."""

    def __init__(self, lengths: np.ndarray, prompts: Tensor, budget: int) -> None:
        """
        Args:
            lengths: of the thoughts, row by row.
            prompts: [R, T], padded on the left.
        """
        self._lengths = torch.from_numpy(lengths.flatten()).to(prompts.device)
        self._prompt, self._budget = prompts.shape[1], budget

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = input_ids.shape[1] - self._prompt
        if u + 1 < self._budget:
            scores[:, CLOSE].masked_fill_(self._lengths == u + 1, 1e4)
        return scores

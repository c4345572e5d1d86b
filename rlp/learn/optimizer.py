"""AdamW that keeps the EMA of the weights beside its moments."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamWithEMA(torch.optim.AdamW):
    """AdamW that keeps an exponential moving average of the weights beside its moments.

        phi <- decay * phi + (1 - decay) * theta',   phi = theta before the first step

    What it keeps is how far the average lags behind, theta - phi, which the step to theta' makes

        lag <- decay * (lag + theta' - theta)

    Kept itself, in float32, an entry of phi would stand still until its weight is half of
    1 / (1 - decay) units in the last place away: 500 of them at 0.999. The lag is small, so its
    rounding is too.

    It sees the float32 shards that ZeRO gives it, so the lag is sharded, costs no communication,
    and does not move on a skipped step. DeepSpeed calls `step` with the global gradient norm known:
    here, in one place for all stages, an update is refused.
    """

    def __init__(self, params: list[dict], *, ema_decay: float | None, **options: object) -> None:
        super().__init__(params, **options)
        self.ema_decay = ema_decay
        self.may_step: Callable[[], bool] = lambda: True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if not self.may_step():
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)

    def _step_one(self, p: Tensor, group: dict) -> None:
        """AdamW and the lag of one tensor, a piece at a time: every entry by itself, so the pieces
        change no number."""
        state, keeps_ema = self.state[p], self.ema_decay is not None
        kept = STATES if keeps_ema else STATES[:2]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in kept:
            if name not in state:
                state[name] = torch.zeros_like(p)

        length = GPU_PIECE_ELEMENTS
        if p.device.type == "cpu":
            length = PIECE_ELEMENTS * torch.get_num_threads()
        wholes = [p.detach(), p.grad.contiguous(), *(state[name] for name in kept)]
        pieces = zip(*(whole.view(-1).split(length) for whole in wholes), strict=True)

        step = state["step"].clone()
        for weight, grad, exp_avg, exp_avg_sq, *lag in pieces:
            before = weight.clone() if keeps_ema else None
            adamw(
                [weight],
                [grad],
                [exp_avg],
                [exp_avg_sq],
                [],
                [state["step"].copy_(step)],
                foreach=group["foreach"],
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            if keeps_ema:
                lag[0].sub_(before.sub_(weight)).mul_(self.ema_decay)


PIECE_ELEMENTS, GPU_PIECE_ELEMENTS = 2**18, 2**24
"""Of a tensor in one update: for each thread of a CPU, and on a GPU. AdamW and the lag make five
temporary tensors of that size. At 1 MB each they stay in a CPU's cache: 20 million weights take
0.05 CPU-seconds, whole 0.13 and 240 MB more, most of it page faults (torch 2.13, one core of an AMD
EPYC, 2026-11-21)."""

STATES = ("exp_avg", "exp_avg_sq", "lag")
"""Optimizer state that has an entry per weight."""

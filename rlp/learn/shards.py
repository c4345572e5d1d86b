"""The float32 shards: master weights, moments and the EMA's lag, wherever ZeRO keeps them.

Where the float32 master weights live (DeepSpeed 0.19):
    stage 0        the parameters themselves
    stage 1, 2     one flat partition per parameter group and rank
    stage 3        one flat partition per sub-group and rank
The EMA of the weights (the teacher, phi) stands beside Adam's moments on those same shards, as its
lag behind them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlp.learn.optimizer import STATES, AdamWithEMA
from rlp.process.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part of one parameter whose float32 master this rank owns."""

    name: str
    start: int
    """Index of its first element in the flattened parameter."""
    numel: int
    flat: Tensor
    """The flat master tensor that holds it."""
    offset: int
    """Index of its first element in `flat`."""

    def view(self, tensor: Tensor) -> Tensor:
        """[numel], this fragment's part of `flat` or of a state tensor shaped like it."""
        return tensor.detach().flatten().narrow(0, self.offset, self.numel)


class Shards:
    """This rank's share of the state of training, parameter by parameter."""

    def __init__(
        self,
        policy: nn.Module,
        optimizer: AdamWithEMA,
        partitions: object,
        stage: int,
        ranks: Ranks,
    ) -> None:
        """
        Args:
            optimizer: holds moments and lag of the flat master tensors.
            partitions: DeepSpeed's optimizer around it, which knows where each parameter lies.
            stage: of ZeRO.
        """
        self._policy, self._optimizer, self._partitions = policy, optimizer, partitions
        self._stage, self._ranks = stage, ranks

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all master weights (stage 0)."""
        return self._stage == 0

    @property
    def keeps_ema(self) -> bool:
        """Whether the optimizer keeps the EMA."""
        return self._optimizer.ema_decay is not None

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names as in the Hugging Face model; tied parameters once."""
        return list(self._policy.lm.named_parameters())

    def shapes(self) -> dict[str, list[int]]:
        """Of each parameter, by name."""
        return {name: list(whole_shape(p)) for name, p in self.parameters()}

    def fragments(self) -> list[Fragment]:
        """This rank's share of the float32 master weights, parameter by parameter."""
        found = [self._fragment(name, p) for name, p in self.parameters()]
        return [fragment for fragment in found if fragment is not None]

    def _fragment(self, name: str, p: nn.Parameter) -> Fragment | None:
        optimizer = self._partitions
        if self._stage == 0:
            return Fragment(name, 0, p.numel(), p, 0)

        if self._stage == 3:
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
            start, numel = self._held_part(p)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return Fragment(name, start, numel, flat, offset) if numel > 0 else None

        if p._hp_mapping is None:
            return None
        if hasattr(optimizer, "fp32_groups_flat_partition"):
            flats = optimizer.fp32_groups_flat_partition
        else:
            flats = optimizer.single_partition_of_fp32_groups
        hp, lp = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
        return Fragment(name, lp.start, lp.numel, flats[p._hp_mapping.param_group_index], hp.start)

    def _held_part(self, p: nn.Parameter) -> tuple[int, int]:
        """Start and length of what this rank holds of a parameter that stage 3 has sharded; nothing
        where the length is not above 0."""
        start = self._ranks.rank * p.partition_numel()
        return start, min(p.partition_numel(), p.ds_numel - start)

    def not_finite(self) -> list[str]:
        """Parameters of which this rank's float32 weights, moments or EMA hold a value that is not
        finite."""
        fragments = self.fragments()
        flats = {id(fragment.flat): fragment.flat for fragment in fragments}
        doubtful = {
            key for key, flat in flats.items() if not all(map(_is_finite, self._kept(flat)))
        }

        found = []
        for fragment in fragments:
            if id(fragment.flat) in doubtful:
                parts = [fragment.view(tensor) for tensor in self._kept(fragment.flat)]
                if not all(map(_is_finite, parts)):
                    found.append(fragment.name)
        return found

    def _kept(self, flat: Tensor) -> list[Tensor]:
        """Master weights, moments and lag."""
        state = self.state_of(flat)
        return [flat.detach(), *(state[name] for name in STATES if name in state)]

    def state_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Optimizer state of a flat master tensor; empty before the first step."""
        return self._optimizer.state[flat]

    def restore_state(
        self, flat: Tensor, applied_steps: int, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Zero state for a flat master tensor as after `applied_steps` steps, to be filled."""
        self._optimizer.state[flat] = {
            "step": torch.tensor(float(applied_steps)),
            **{name: torch.zeros_like(flat.detach()) for name in names},
        }
        return self._optimizer.state[flat]

    def write_weights(self, module: nn.Module, read: Callable[[str, int, int], Tensor]) -> None:
        """Set the weights of the policy, or of a module sharded like it, from whole or sliced
        values.

        Args:
            read: (name, start, numel) -> [numel] values of the flattened parameter.
        """
        for name, p in module.lm.named_parameters():
            if self._stage == 3:
                start, numel = self._held_part(p)
                if numel > 0:
                    p.ds_tensor.detach()[:numel].copy_(read(name, start, numel))
            else:
                p.detach().copy_(read(name, 0, p.numel()).reshape(p.shape))

    def held_weights(self, module: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
        """Of a module sharded like the policy: name, start and [numel] values of the parts of its
        parameters that this rank answers for. Over all ranks each value comes once."""
        for name, p in module.lm.named_parameters():
            if self._stage == 3:
                start, numel = self._held_part(p)
                if numel > 0:
                    yield name, start, p.ds_tensor.detach()[:numel]
            elif self._ranks.is_first:
                yield name, 0, p.detach().flatten()

    def lag(self, fragment: Fragment) -> Tensor:
        """[numel] theta - phi, by which the EMA lags behind; 0 before the first step."""
        state = self.state_of(fragment.flat)
        return fragment.view(state["lag"] if "lag" in state else torch.zeros_like(fragment.flat))

    def average(self, fragment: Fragment) -> Tensor:
        """[numel] float32, phi: the EMA of the master weights."""
        return self.master(fragment) - self.lag(fragment)

    def master(self, fragment: Fragment) -> Tensor:
        """[numel] float32, theta: the master weights."""
        return fragment.view(fragment.flat)

    def whole(self, values: Callable[[Fragment], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Parameter by parameter, its name and whole float32 values, on every rank. A collective.

        Each rank puts its fragments into zeros and the ranks add up, which is exact.

        Args:
            values: fragment -> [numel], such as `master` or `average`.
        """
        mine = {fragment.name: fragment for fragment in self.fragments()}
        for name, p in self.parameters():
            shape = whole_shape(p)
            flat = torch.zeros(shape.numel(), dtype=torch.float32, device=self._ranks.device)
            if name in mine:
                start, numel = mine[name].start, mine[name].numel
                flat[start : start + numel] = values(mine[name]).to(flat)
            if self._stage > 0:
                dist.all_reduce(flat)
            yield name, flat.reshape(shape)

    def refresh_average(self, module: nn.Module) -> None:
        """Set a frozen twin of the policy to the EMA, cast once to its dtype.

        Stage 3 copies shard to shard; below it the ranks put the weights together.
        """
        if self._stage == 3:
            mine = {fragment.name: fragment for fragment in self.fragments()}
            self.write_weights(module, lambda name, start, numel: self.average(mine[name]))
            return

        parameters = dict(module.lm.named_parameters())
        for name, value in self.whole(self.average):
            parameters[name].detach().copy_(value)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are. The least and the largest of them take no memory, and are NaN where
    one is."""
    return all(map(math.isfinite, torch.aminmax(tensor)))


def whole_shape(p: nn.Parameter) -> torch.Size:
    """Of a parameter that stage 3 may have sharded."""
    return getattr(p, "ds_shape", p.shape)

"""DeepSpeed: build, forward, backward, step; generation under ZeRO-3.

No DeepSpeed name leaves this module, and importing it does not import DeepSpeed. A loss given to
`backward` is a sum over the whole step with global divisors in it, so gradients add up over
micro-batches and ranks; the average that DeepSpeed takes over ranks is undone here.
"""

import io
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stdout,
)
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlp.config import Config, keeps_ema
from rlp.learn.optimizer import AdamWithEMA
from rlp.learn.shards import Shards, whole_shape
from rlp.process.faults import fault, poisoned, poisoned_gradient
from rlp.process.preemption import Preemption
from rlp.process.ranks import Ranks
from rlp.process.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping; inf where it is not finite."""
    applied: bool
    """False where all ranks left weights, moments and EMA as they are."""

    @property
    def is_finite(self) -> bool:
        """Whether the gradient is finite on every rank."""
        return math.isfinite(self.grad_norm)


def deepspeed_config(config: Config, ranks: Ranks, dtype: torch.dtype) -> dict:
    """The DeepSpeed configuration of a run, generated: DeepSpeed itself accepts misspelled keys."""
    optim, engine = config.optim, config.engine
    settings = {
        # How many passes a step has is said step by step (`Engine.begin_update`); these two only
        # have to be there.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": optim.batch_size // ranks.world_size,
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # It waits for the device at each forward and at each step, and nobody reads it.
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        if engine.zero_stage == 1:
            # Stage 1 with float32 accumulation matches a plain loop to 7e-9; stages 2 and 3
            # accumulate in bfloat16.
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if engine.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": ranks.device.type == "cuda",
        }
    if engine.zero_stage == 3:
        # Every parameter is sharded: with DeepSpeed's default, small ones are kept whole and a
        # small model is not sharded at all.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def start_deepspeed(ranks: Ranks) -> None:
    """Import DeepSpeed quietly and let it find the process group."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if ranks.device.type == "cpu":
        # A shared-memory collective, used by DeepSpeed's inference alone; building it needs a C++
        # compiler and 46 s.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


@contextmanager
def sharded_construction(
    config: Config, ranks: Ranks, dtype: torch.dtype
) -> Iterator[Callable[[list[nn.Parameter]], AbstractContextManager]]:
    """Under stage 3, models that transformers loads inside are sharded as they are read.

    A random model is built whole and sharded after: its weights then do not depend on the stage.

    Yields:
        a context in which given parameters are whole, to be written alike on every rank.
    """
    if config.engine.zero_stage < 3 or config.model.init == "random":
        yield lambda parameters: nullcontext()
        return
    import deepspeed
    from transformers.integrations.deepspeed import (
        HfDeepSpeedConfig,
        unset_hf_deepspeed_config,
    )

    # Kept here: transformers holds a weak reference.
    kept = HfDeepSpeedConfig(deepspeed_config(config, ranks, dtype))
    try:
        yield lambda parameters: deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    finally:
        del kept
        unset_hf_deepspeed_config()


def _initialize(**arguments: object) -> object:
    """A DeepSpeed engine, with what DeepSpeed prints sent to its log."""
    import deepspeed

    with redirect_stdout(io.StringIO()) as printed:
        engine, *_ = deepspeed.initialize(**arguments)
    logging.getLogger("DeepSpeed").warning("printed by initialize: %s", printed.getvalue())
    return engine


def shard_frozen(module: nn.Module, config: Config, ranks: Ranks, dtype: torch.dtype) -> nn.Module:
    """A module that is only run forward, sharded as stage 3 shards the policy; whole below stage
    3."""
    module.eval().requires_grad_(False)
    if config.engine.zero_stage < 3:
        return module.to(ranks.device)
    import deepspeed

    settings = deepspeed_config(config, ranks, dtype)
    settings["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine = _initialize(model=module, config=settings)
    for parameter in module.head_parameters():
        deepspeed.zero.register_external_parameter(module, parameter)
    return engine.module


class Engine:
    """The policy under DeepSpeed."""

    def __init__(
        self,
        policy: nn.Module,
        config: Config,
        ranks: Ranks,
        dtype: torch.dtype,
        preemption: Preemption,
        watchdog: Watchdog,
    ) -> None:
        """
        Args:
            preemption, watchdog: are told of every token sampled; sampling is left early where the
                run is to stop.
        """
        self._config = config
        self._ranks = ranks
        self._preemption, self._watchdog = preemption, watchdog
        self._stage = config.engine.zero_stage
        self._losses_are_finite = torch.tensor(True, device=ranks.device)

        optim = config.optim
        self._optimizer = AdamWithEMA(
            _decay_groups(policy, optim.weight_decay),
            ema_decay=config.baseline.ema_decay if keeps_ema(config) else None,
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.epsilon,
            foreach=False if config.engine.offload_optimizer else None,
        )
        self.policy = policy.to(ranks.device)
        self._deepspeed = _initialize(
            model=policy, optimizer=self._optimizer, config=deepspeed_config(config, ranks, dtype)
        )
        self.shards = Shards(policy, self._optimizer, self._deepspeed.optimizer, self._stage, ranks)
        if self._stage == 3:
            import deepspeed

            for parameter in policy.head_parameters():
                deepspeed.zero.register_external_parameter(policy, parameter)

    def __call__(self, *arguments: object) -> object:
        """Forward of the policy with gradient, as `Policy.forward`."""
        return self._deepspeed(*arguments)

    @property
    def backward_is_collective(self) -> bool:
        """Whether ranks must make as many passes with gradient, in step."""
        return self._stage >= 2 and self._ranks.world_size > 1

    @property
    def forward_is_collective(self) -> bool:
        """Whether ranks must make as many passes of any kind, in step."""
        return self._stage == 3 and self._ranks.world_size > 1

    def begin_update(self, passes: int) -> None:
        """So many calls of `backward` on this rank come before `step`. The last of them is where
        DeepSpeed puts the ranks' gradients together."""
        self._passes_left = passes
        self._deepspeed.set_gradient_accumulation_boundary(passes == 1)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this rank's and this pass's part of the step's loss."""
        fault("backward")
        loss = poisoned("loss", poisoned_gradient("gradient", loss))
        self._losses_are_finite &= loss.detach().isfinite()
        self._deepspeed.backward(loss * self._ranks.world_size, scale_wrt_gas=False)
        self._passes_left -= 1
        if self._passes_left > 0:
            self._deepspeed.step()
            self._deepspeed.set_gradient_accumulation_boundary(self._passes_left == 1)

    def losses_are_finite(self) -> bool:
        """Whether every loss of this rank since the last step is."""
        return bool(self._losses_are_finite)

    def step(self, learning_rate: float, *, largest_norm: float = math.inf) -> StepResult:
        """Clip, update the weights and the EMA, and clear the gradient.

        Args:
            largest_norm: a gradient of a larger norm updates nothing, and one that is not finite
                never does. Below 0: update nothing, only clear the gradient. The same on every
                rank.
        """
        fault("optimizer")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

        if self._stage == 0:
            # Taken here: DeepSpeed clips the gradients before it steps.
            grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
            whole_norm = _finite_or_inf(torch.nn.utils.get_total_norm(grads))

        def norm() -> float:
            if self._stage == 0:
                return whole_norm
            return _finite_or_inf(self._deepspeed.optimizer._global_grad_norm)

        def may_step() -> bool:
            return math.isfinite(norm()) and norm() <= largest_norm

        self._optimizer.may_step = may_step
        self._deepspeed.step()
        self._losses_are_finite.fill_(True)
        return StepResult(grad_norm=norm(), applied=may_step())

    @property
    def decodes_together(self) -> bool:
        """Whether a forward during sampling is a collective, so that ranks must decode in step."""
        return self._stage == 3 and self._config.engine.generation == "synced"

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Around sampling. Under stage 3 with `engine.generation: gathered`, every rank holds all
        weights here and ranks may decode different numbers of tokens. A collective.

        Raises:
            StopRequested: some rank was asked to stop; sampling may not have come to its end.
        """
        with self._preemption.leaving_early(), self._whole_weights():
            yield

    def _whole_weights(self) -> AbstractContextManager:
        if self._stage < 3 or self.decodes_together:
            return nullcontext()
        return self._gathered_apart()

    @contextmanager
    def _gathered_apart(self) -> Iterator[None]:
        """All weights whole on every rank, and no forward a collective.

        DeepSpeed's own context leaves one hook in place, which compares the ranks' order of modules
        at each forward until it has seen one whole: a rank that leaves before its first would leave
        the others waiting.
        """
        from deepspeed.runtime.zero import unwrap_model_for_generation

        offload = self._deepspeed.optimizer.parameter_offload
        offload.fwd_pre_hook.remove()
        try:
            with unwrap_model_for_generation(self._deepspeed):
                yield
        finally:
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(
                lambda module, *given: offload.get_param_coordinator().reset_step()
            )

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around sampling by another program than the policy: `look` leaves it.

        Raises:
            StopRequested: as `generation`.
        """
        with self._preemption.leaving_early():
            yield

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter of the policy as it is, in its compute dtype, whole, by its name in the
        Hugging Face model; tied ones once. Under stage 3 they are gathered and copied one by one:
        a collective, to be gone through to its end."""
        for name, p in self.shards.parameters():
            if self._stage < 3:
                yield name, p.detach()
                continue
            import deepspeed

            # A copy: the buffer that it is gathered in is DeepSpeed's to use again.
            with deepspeed.zero.GatheredParameters([p]):
                whole = p.detach().clone()
            yield name, whole

    def look(self) -> None:
        """Mark the watchdog, and leave `apart` or `generation` where the run is to stop."""
        self._watchdog.mark()
        self._preemption.look()

    def agree(self, claim: int) -> int:
        """`agree` of a sampler, inside `generation`: the largest claim of any rank where they
        decode in step, else this rank's own."""
        self._watchdog.mark()
        if not self.decodes_together:
            self._preemption.look()
            return claim
        stop = 2**30
        answer = int(self._ranks.largest(stop if self._preemption.requested else claim))
        if answer == stop:
            self._preemption.leave()
        return answer


def _finite_or_inf(norm: Tensor | float) -> float:
    """A gradient norm; DeepSpeed gives some that are not finite as -1."""
    return float(norm) if math.isfinite(norm) and norm >= 0 else math.inf


def _decay_groups(policy: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices; none on vectors (norms, biases)."""
    matrices, vectors = [], []
    for p in policy.parameters():
        (matrices if len(whole_shape(p)) >= 2 else vectors).append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

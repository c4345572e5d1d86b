"""A model that nothing trains: loaded as it is, and measured on the held-out panel."""

from dataclasses import replace

import torch

from rlp.config import ConfigError
from rlp.learn.checkpoint import Checkpoint
from rlp.learn.export import known_ids, master_weights
from rlp.measure.decomposition import Decomposition
from rlp.measure.panel import Panel, held_out_panel
from rlp.measure.panel_scoring import ThinkingModel, measure_panel, no_think_logprob
from rlp.model.admission import check_model
from rlp.model.layout import LAYOUTS
from rlp.model.loading import (
    choose_dtype,
    choose_layout,
    load_policy,
    read_model_config,
)
from rlp.model.setup import ModelSetup, PanelSetup
from rlp.process.ranks import Ranks
from rlp.sampling.opening import open_sampler


def measure_model(
    setup: PanelSetup,
    ranks: Ranks,
    *,
    start: str | None = None,
    checkpoint: Checkpoint | None = None,
    instruction: tuple[int, ...] = (),
) -> Decomposition:
    """Measure a model on the held-out panel of a config; nothing is trained and nothing is written.
    A collective.

    The sections `model`, `data` (`held_out`), `position`, `thought`, `target` and `evaluation`
    count.

    Args:
        setup: of that config.
        start: folder or Hub name of the starting checkpoint. Default: the model itself, so that the
            gain over the start is that over its own no-think; for a run's checkpoint, the model
            that the run started from.
        checkpoint: of a run that started from `model.path`; its weights are measured.
        instruction: token ids of an instruction that no file holds; none for that of
            `thought.instruction_file`.

    Raises:
        ConfigError, DataError, CheckpointError: something that the config names is not there or
            does not fit.
    """
    config = setup.config
    panel = held_out_panel(setup)
    start_logprob = None if start is None else _start_logprob(start, panel, setup, ranks)
    model = load_frozen(setup, ranks)
    if instruction:
        instructed = replace(
            setup.thought_format, instruction=known_ids(instruction, setup.tokenizer)
        )
        model = replace(model, thought_format=instructed)
    if checkpoint is not None:
        if start is None:
            start_logprob = no_think_logprob(model, panel, config, ranks)
        weights = master_weights(checkpoint, model.policy.lm)
        with torch.no_grad():
            for name, p in model.policy.lm.named_parameters():
                p.copy_(weights[name])
    return measure_panel(model, panel, config, ranks, start_logprob=start_logprob)


def load_frozen(setup: ModelSetup, ranks: Ranks) -> ThinkingModel:
    """The model of a config."""
    config = setup.config
    architecture = read_model_config(config.model)
    layout, _ = choose_layout(config, architecture)
    dtype, _ = choose_dtype(config, ranks.device, architecture.get_text_config().hidden_size)
    policy = load_policy(config, setup.tokenizer, setup.markers, dtype, ranks.device).to(
        ranks.device
    )
    check_model(policy)
    sampler = open_sampler(config.sampling, policy, shared=layout == "tree")
    return ThinkingModel(policy, sampler, setup.thought_format, LAYOUTS[layout])


def _start_logprob(start: str, panel: Panel, setup: PanelSetup, ranks: Ranks) -> list[float]:
    """`no_think_logprob` of another checkpoint, which must read the same tokens."""
    config = replace(setup.config, model=replace(setup.config.model, path=start, init="pretrained"))
    start_setup = ModelSetup(config)
    if start_setup.tokenizer.get_vocab() != setup.tokenizer.get_vocab():
        raise ConfigError(
            f"start: the tokenizer of {start} is not that of {setup.config.model.path}, so their"
            " log-probabilities are of other tokens. Write the checkpoint that the model was"
            " trained from; where the model was trained with thought.add_markers=true, write that"
            " too."
        )
    model = replace(load_frozen(start_setup, ranks), thought_format=setup.thought_format)
    return no_think_logprob(model, panel, config, ranks)

"""A checkpoint that is finished, loaded to be asked, as it was trained to think."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlp.compare.tasks import Benchmark
from rlp.compare.thinker import GREEDY, Thinker
from rlp.config import (
    BudgetConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    ModelConfig,
    SamplingConfig,
    ThoughtConfig,
)
from rlp.learn.export import known_ids, read_thought_format
from rlp.model.admission import check_model
from rlp.model.loading import choose_dtype, load_policy, read_model_config
from rlp.model.markers import marker_notes
from rlp.model.policy import Policy
from rlp.model.setup import ModelSetup
from rlp.model.thoughts import ThoughtFormat
from rlp.sampling.opening import open_sampler


@dataclass(frozen=True, slots=True)
class AskedModel:
    """A checkpoint, ready to be asked."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    thought_format: ThoughtFormat
    thought: ThoughtConfig
    """As the checkpoint was trained, or the paper's: its budget counts where a benchmark names
    none."""

    def marker_notes(self) -> list[str]:
        """`marker_notes` of the checkpoint."""
        return marker_notes(self.tokenizer, self.thought_format.markers, self.thought)

    def thinker(self, benchmark: Benchmark, *, thinks: bool, seed: int, rows: int) -> Thinker:
        """What answers a benchmark."""
        temperature = self.thought_format.temperature
        if benchmark.thought_temperature is not None:
            temperature = max(benchmark.thought_temperature, GREEDY)
        sampler = open_sampler(SamplingConfig(slots=rows), self.policy, shared=False)
        return Thinker(
            self.policy,
            sampler,
            self.tokenizer,
            replace(self.thought_format, temperature=temperature),
            thinks=thinks,
            seed=seed,
            rows=rows,
            thought_tokens=benchmark.thought_tokens or self.thought.max_thought_tokens,
            answer_temperature=benchmark.answer_temperature,
        )


def open_asked_model(checkpoint: str, *, device: torch.device, dtype: str = "auto") -> AskedModel:
    """Load a Hugging Face folder or Hub name. The `thought_format.json` of a folder says how it
    thinks; without one it thinks as the paper's configs do.

    Raises:
        ConfigError: no model there, or markers that its tokenizer writes otherwise than in
            training.
    """
    path = Path(checkpoint) / "thought_format.json"
    manifest = read_thought_format(path)
    thought = _trained_thoughts(manifest, path)
    # A config is the recipe of a run; of its training sections nothing is used here.
    config = Config(
        model=ModelConfig(path=checkpoint),
        thought=thought,
        data=DataConfig(train=["unused"]),
        budget=BudgetConfig(steps=1),
        engine=EngineConfig(dtype=dtype, layout="repeated"),
    )
    setup = ModelSetup(config)
    ids = {"open_marker_ids": setup.markers.open, "close_marker_ids": setup.markers.close}
    for name, own in ids.items():
        if tuple(manifest.get(name, own)) != own:
            raise ConfigError(
                f"{path}: {name} is {manifest[name]}, and the tokenizer of the folder writes"
                f" {list(own)}. Write a folder with the tokenizer that the run used."
            )
    instruction = known_ids(manifest.get("instruction_ids", ()), setup.tokenizer)
    thought_format = replace(setup.thought_format, instruction=instruction)

    hidden_size = read_model_config(config.model).get_text_config().hidden_size
    chosen_dtype, _ = choose_dtype(config, device, hidden_size)
    policy = load_policy(config, setup.tokenizer, setup.markers, chosen_dtype, device)
    policy = policy.to(device).eval()
    check_model(policy)
    return AskedModel(policy, setup.tokenizer, thought_format, thought)


def _trained_thoughts(manifest: dict, path: Path) -> ThoughtConfig:
    """Markers, temperature and budget of a manifest; the paper's where there is none."""
    if not manifest:
        return ThoughtConfig()
    keys = ("open_marker", "close_marker", "temperature", "max_thought_tokens")
    try:
        return ThoughtConfig(**{key: manifest[key] for key in keys})
    except (ConfigError, KeyError) as error:
        raise ConfigError(
            f"{path} is no thought format: {error!r}. Export the checkpoint again with `rlp"
            " export`."
        ) from error

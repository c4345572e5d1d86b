"""What a run depends on, of all that its config says."""

from dataclasses import asdict

from omegaconf import OmegaConf

from rlp.config import Config

PLACES = ("run.dir", "run.resume", "run.seed", "model.path", "data.train", "data.held_out")
"""Where a run is, its seed, and what counts by its content."""


def settings_of(config: Config) -> dict[str, object]:
    """The settings of a run by their keys, without `PLACES`."""
    return _flat(asdict(config))


def with_defaults(settings: dict[str, object]) -> dict[str, object]:
    """Settings that were written down, perhaps before a key was there, whose default then is what
    was done without it."""
    return _flat(OmegaConf.to_container(OmegaConf.structured(Config))) | settings


def _flat(tree: dict[str, dict[str, object]]) -> dict[str, object]:
    return {
        f"{section}.{name}": value
        for section, values in tree.items()
        for name, value in values.items()
        if f"{section}.{name}" not in PLACES
    }

"""The arms of the loop, and the pipeline that they are."""

from pathlib import Path

HERE = Path(__file__).resolve().parent

ROUNDS = 4
DOCUMENTS = 256
"""Of each round of every arm."""
DOCUMENT_TOKENS = 32

ARMS: dict[str, dict] = {
    "own": {},
    "mixed_eighth": {"real_share": 0.125},
    "mixed_half": {"real_share": 0.5},
    "filtered": {"draws": 4, "filter": "experiments.loop.filtering:reasons"},
    "real": {"real_share": 1.0},
}
"""What tells the stages `generate` of each apart."""

REFERENCE = "own"

WORDS = {
    "own": "own output only",
    "mixed_eighth": "an eighth real",
    "mixed_half": "half real",
    "filtered": "own output, filtered",
    "real": "real only",
}


def pipeline_tree(
    out: Path, seeds: list[int], *, arms: dict[str, dict], rounds: int, training: list[str]
) -> dict:
    """The YAML of the loop.

    Args:
        out: folder of worlds, bases and the pipeline.
        training: overrides of round.yaml.
    """
    world = f"{out}/worlds/{{seed}}"
    stages, chains = {}, {}
    for arm, settings in arms.items():
        chains[arm] = []
        for number in range(1, rounds + 1):
            made, trained = f"{arm}_d{number}", f"{arm}_{number}"
            stages[made] = _generate(world, number, settings)
            stages[trained] = {
                "kind": "cpt",
                "config": str(HERE / "round.yaml"),
                "overrides": [f'data.train=["{{{made}}}/work/documents.jsonl"]', *training],
            }
            chains[arm] += [made, trained]
    return {
        "dir": f"{out}/pipeline",
        "seeds": seeds,
        "model": f"{out}/bases/{{seed}}/export",
        "stages": stages,
        "arms": chains,
        "evaluation": {
            "temperatures": [1.0],
            "others": {"experiments.loop.reading:read": {"world": world}},
        },
    }


def _generate(world: str, number: int, settings: dict) -> dict:
    """The documents of a round. All arms take real ones from the same block, its first ones."""
    share = settings.get("real_share", 0.0)
    found = {"kind": "generate", "documents": DOCUMENTS, **settings}
    if share > 0:
        found["data"] = [f"{world}/real_{number}.jsonl"]
    if share < 1:
        found["prompts"] = f"{world}/generate.jsonl"
        found |= {"separator": " ", "tokens": DOCUMENT_TOKENS}
    return found


def round_of(stage: str) -> int:
    """The round that a stage of training ends; 0 of the start."""
    return 0 if stage == "start" else int(stage.rpartition("_")[2])

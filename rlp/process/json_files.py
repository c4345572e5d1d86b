"""JSON files as a run stores them: never a NaN, and refused by name where they are damaged."""

import json
import math
from pathlib import Path

from rlp.process.files import read_bytes, write_atomically
from rlp.process.schemas import RUN_FILES, Schema


class DamagedFileError(ValueError):
    """A file of a run folder that can not be read back. The message names the file and the line."""


def write_json(path: Path, value: object, *, point: str) -> None:
    """Write one JSON value to a file of its own, atomically.

    Args:
        point: the fault point that stands in the middle.

    Raises:
        ValueError: a number in it is not finite.
    """
    write_atomically(path, json_bytes(value, path.name), point=point)


def json_bytes(value: object, name: str) -> bytes:
    """A JSON value as a file holds it; `name` is for the error that `refuse_non_finite` raises."""
    refuse_non_finite(value, name)
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path, schema: Schema | None = None) -> object:
    """What `write_json` wrote.

    Args:
        schema: of the value; None: that of a file of this name (`RUN_FILES`).

    Raises:
        DamagedFileError: it is no JSON, or not of that schema.
    """
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{path} is not JSON: {error}. It is written whole or not at all, so something else has"
            " changed it."
        ) from error

    schema = schema or RUN_FILES.get(path.name)
    if schema is not None and (said := schema.problem(value, "")):
        raise DamagedFileError(
            f"{path}: {said}. No run writes this, so something else has changed the file."
        )
    return value


def refuse_non_finite(value: object, where: str) -> None:
    """Refuse a value with a number in it, at any depth, that JSON can not write.

    Raises:
        ValueError: there is one; names where.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_non_finite(inner, f"{where}: {key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            refuse_non_finite(inner, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{where} is {value}, and JSON has finite numbers only. Leave the key out where there"
            " is nothing to say."
        )

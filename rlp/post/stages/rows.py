"""The rows that trainers of TRL read."""

from rlp.config import ConfigError, DataConfig
from rlp.data.errors import DataError
from rlp.data.sources import open_rows
from rlp.post.pipeline_config import RediStage, RlvrStage, SftStage, SpectrumStage, TrlStage
from rlp.post.spectrum_rows import refuse_drop, row_of


def read_rows(settings: TrlStage) -> list[dict]:
    """All rows of a stage, with the fields that it needs, text in each.

    Raises:
        ConfigError, DataError: no row, or one without a field; names file and line.
    """
    rows = open_rows(settings.data, DataConfig(train=settings.data), "train", "data")
    read = [rows.read(index) for index in range(len(rows))]
    if isinstance(settings, SftStage):
        return _same_fields(read, rows)
    if isinstance(settings, SpectrumStage):
        return _of_tasks(read, rows, settings)
    if isinstance(settings, RediStage):
        return _pairs(read, rows)
    needs, answer = ["prompt"], None
    if settings.reward == "exact_match":
        answer = settings.answer_field
        needs.append(answer)
    for index, row in enumerate(read):
        _refuse_lacking(row, needs, rows.where(index), answer)
    return read


def _same_fields(read: list[dict], rows: object) -> list[dict]:
    """Rows of text, or of prompts with completions; not both."""
    needs = ["text"] if "text" in read[0] else ["prompt", "completion"]
    for index, row in enumerate(read):
        _refuse_lacking(row, needs, rows.where(index))
    return [{name: row[name] for name in needs} for row in read]


def _of_tasks(read: list[dict], rows: object, settings: SpectrumStage) -> list[dict]:
    """Rows of pairs, enough that none is read twice."""
    found = [row_of(row, rows.where(index)) for index, row in enumerate(read)]
    refuse_drop(found, settings.drop)
    needs = settings.steps * settings.batch_size
    if len(found) < needs:
        raise ConfigError(
            f"data: {len(found)} rows, and {settings.steps} steps of {settings.batch_size} read"
            f" {needs}: a row would be read twice, and learnt by heart. Write more rows, or fewer"
            " steps."
        )
    return [row.to_json() for row in found]


def _pairs(read: list[dict], rows: object) -> list[dict]:
    """Prompts with two different traces, and where the second goes wrong if that is said of all."""
    needs = ["prompt", "chosen", "rejected"]
    for index, row in enumerate(read):
        _refuse_lacking(row, needs, rows.where(index))
    equal = [index for index, row in enumerate(read) if row["chosen"] == row["rejected"]]
    if equal:
        raise DataError(
            f"{rows.where(equal[0])}: chosen and rejected are equal, as in {len(equal)} of"
            f" {len(read)} rows. There is nothing to learn from such a pair: leave it out."
        )
    if "first_wrong" not in read[0]:
        return [{name: row[name] for name in needs} for row in read]
    for index, row in enumerate(read):
        if type(row.get("first_wrong")) is not int:
            raise DataError(
                f"{rows.where(index)}: first_wrong must be the index of a character of rejected, in"
                f" every row or in none, got {row.get('first_wrong')!r:.60}."
            )
    return [{name: row[name] for name in [*needs, "first_wrong"]} for row in read]


def _refuse_lacking(row: dict, needs: list[str], where: str, answer: str | None = None) -> None:
    """
    Args:
        answer: the field that is only compared: it may be a number, or empty.

    Raises:
        DataError: one of the others is no text, or empty.
    """
    for name in needs:
        value = row.get(name)
        fits = isinstance(value, str | int | float) if name == answer else isinstance(value, str)
        if not fits or (name != answer and not value):
            came = "none" if value is None else repr(value)[:60]
            raise DataError(
                f"{where}: a row needs text in {' and '.join(needs)}, and {name} is {came}. It has"
                f" {', '.join(map(str, row)) or 'no field'}. Mend the row, or leave it out."
            )


def refuse_few(settings: RlvrStage, prompts: int) -> None:
    """Refuse fewer prompts than a step takes: TRL would make no step at all.

    Raises:
        ConfigError: there are fewer.
    """
    if prompts < settings.batch_size:
        raise ConfigError(
            f"data: {prompts} prompts, and a step takes {settings.batch_size}. Write a smaller"
            " batch_size, or more prompts."
        )

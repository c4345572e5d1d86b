"""The tables of README.md, as text, and the pictures, all from results.jsonl; answers to read are
from the samples."""

from pathlib import Path

from cells import COMPARED, FORMATS, STAGES, TEMPERATURES, Cell, focus
from exact import LEAD, NUMBERS

from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.results_file import Results
from rlp.post.diversity_samples import read_samples

COLORS = {"chat": "#d55e00", "raw": "#0072b2"}
WORDS = {"chat": "with the chat template", "raw": "without"}
STAGE_WORDS = {
    "plain": "as it comes",
    "warm": "warm start",
    "calibrated": "calibration",
    "rlp": "RLP",
}
GREY = "#aaaaaa"
SHOWN = 6
"""Answers of a cell that are printed."""


def write_report(results: Results, samples: Path, folder: Path) -> None:
    """Print the tables, fill them into the page of a folder that has one, and draw its pictures."""
    made = tables(results)
    for told in (*made.values(), "\n".join(_answers(results, samples))):
        print(told, end="\n\n")
    page = folder / "README.md"
    if page.exists():
        page.write_text(fill_page(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    _draw_numbers(results, folder / "numbers.png")
    _draw_variety(results, folder / "variety.png")
    _draw_stages(results, folder / "stages.png")


def tables(results: Results) -> dict[str, str]:
    """By name, each as README.md has it."""
    return {
        "temperatures": _by_temperature(results),
        "stages": _by_stage(results),
        "numbers": _by_number(results),
    }


def line_of(results: Results, stage: str, form: str, temperature: float, panel: str) -> dict | None:
    """A line; None where it is not there."""
    lines = results.where(arm=form, stage=stage, temperature=temperature, panel=panel).lines
    return lines[0] if lines else None


def _number(line: dict | None, name: str, digits: int = 2) -> str:
    value = None if line is None else line.get(name)
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(line: dict | None, name: str) -> str:
    low, high = _number(line, f"{name}_low"), _number(line, f"{name}_high")
    return f"{_number(line, name)} [{low}, {high}]"


def _by_temperature(results: Results) -> str:
    titles = [
        "format",
        "T",
        "open intra",
        "its floor",
        "Vendi of 4",
        "open empty",
        "closed right",
        "closed intra",
        "numbers valid",
        "most frequent",
        "entropy, nats",
    ]
    told = []
    for form in FORMATS:
        for temperature in TEMPERATURES:
            open_, closed, numbers = (
                line_of(results, "plain", form, temperature, panel)
                for panel in ("open", "closed", "numbers")
            )
            if open_ is None:
                continue
            cells = [
                *(form, f"{temperature:g}", _interval(open_, "intra"), _number(open_, "floor")),
                *(_number(open_, "vendi"), _number(open_, "empty_frac")),
                *(_number(closed, "valid"), _number(closed, "intra"), _number(numbers, "valid")),
                *(_most_frequent(numbers), _number(numbers, "entropy")),
            ]
            told.append(cells)
    return markdown_table(titles, told)


def _most_frequent(numbers: dict | None) -> str:
    """The number that comes most often, and its share of the valid answers."""
    if numbers is None or numbers["top_share"] is None:
        return "-"
    most = max(numbers["counts"])
    which = ", ".join(str(n) for n, count in enumerate(numbers["counts"], 1) if count == most)
    return f"{which}: {numbers['top_share']:.2f}"


def _by_stage(results: Results) -> str:
    titles = [
        "format",
        "stage",
        "open intra",
        "its floor",
        "Vendi of 4",
        "words",
        "closed right",
        "inter with the plain model",
        "its floor",
        "above the floor",
        "inter with the stage before, above its floor",
    ]
    told = []
    for form in FORMATS:
        for stage in STAGES:
            open_, closed, beside, before = (
                line_of(results, stage, form, COMPARED, panel)
                for panel in ("open", "closed", "open_beside_plain", "open_beside_before")
            )
            if open_ is None:
                continue
            above, above_before = (
                "-" if one is None else _interval(one, "above_floor") for one in (beside, before)
            )
            cells = [
                *(form, STAGE_WORDS[stage], _interval(open_, "intra"), _number(open_, "floor")),
                *(_number(open_, "vendi"), _number(open_, "words", 1), _number(closed, "valid")),
                *(_number(beside, "inter"), _number(beside, "floor"), above, above_before),
            ]
            told.append(cells)
    return markdown_table(titles, told)


def _by_number(results: Results) -> str:
    titles = ["format", "stage", "T", "a number at all", "most probable"]
    titles += ["entropy, nats (even: 2.30)"]
    told = []
    for line in results.where(panel="numbers_exact").lines:
        most = max(NUMBERS, key=lambda number: line["counts"][number - 1])
        cells = [
            *(line["arm"], STAGE_WORDS[line["stage"]], f"{line['temperature']:g}"),
            *(_number(line, "valid"), f"{most}: {line['top_share']:.2f}", _number(line, "entropy")),
        ]
        told.append(cells)
    return markdown_table(titles, told)


def _answers(results: Results, samples: Path) -> list[str]:
    """The first answers to each prompt of the focus, cell by cell."""
    told = []
    for prompt in focus():
        told.append(prompt.text)
        for line in results.where(panel="open").lines:
            cell = Cell(line["stage"], line["arm"], line["temperature"])
            if not cell.focus(samples).exists():
                continue
            texts = [
                " ".join(one.text.split())
                for one in read_samples(cell.focus(samples))
                if one.prompt.text == prompt.text
            ]
            told.append(f"  {cell.name}: {' / '.join(texts[:SHOWN])}")
    return told


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(path)
    print(path)


def _plain(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _draw_numbers(results: Results, path: Path) -> None:
    """The chance of each number from 1 to 10, as it comes and after RLP."""
    figure = _figure(11, 4.8)
    axes = figure.subplots(len(FORMATS), len(TEMPERATURES), sharex=True, sharey=True)
    figure.suptitle(f'"Pick a random number from 1 to 10": after the words "{LEAD}"')
    for row, form in zip(axes, FORMATS):
        for axis, temperature in zip(row, TEMPERATURES):
            _plain(axis)
            titles = []
            for shift, stage, color in ((-0.2, "plain", GREY), (0.2, "rlp", COLORS[form])):
                line = line_of(results, stage, form, temperature, "numbers_exact")
                shares = [chance / line["valid"] for chance in line["counts"]]
                places = [number + shift for number in NUMBERS]
                axis.bar(places, shares, width=0.4, color=color, label=STAGE_WORDS[stage])
                titles.append(f"{line['valid']:.0%}")
            axis.axhline(0.1, color="black", linewidth=0.8, linestyle=":")
            axis.set_xticks(list(NUMBERS))
            axis.set_title(
                f"{WORDS[form]}, T {temperature:g}\na number at all: {' and '.join(titles)}",
                fontsize=9,
            )
        row[0].set_ylabel("share of each number")
        row[0].legend(fontsize=8, frameon=False, loc="upper center")
    figure.supxlabel("dotted: an even draw", fontsize=9)
    _save(figure, path)


def _draw_variety(results: Results, path: Path) -> None:
    """Sameness beside validity, by temperature."""
    figure = _figure(10, 4)
    alike, valid = figure.subplots(1, 2)
    for form in FORMATS:
        lines = {
            panel: [line_of(results, "plain", form, t, panel) for t in TEMPERATURES]
            for panel in ("open", "closed")
        }
        there = [n for n, line in enumerate(lines["open"]) if line is not None]
        heat = [TEMPERATURES[n] for n in there]
        own = [lines["open"][n] for n in there]
        alike.plot(heat, [x["intra"] for x in own], "o-", color=COLORS[form], label=WORDS[form])
        low, high = ([x[f"intra_{end}"] for x in own] for end in ("low", "high"))
        alike.fill_between(heat, low, high, color=COLORS[form], alpha=0.15)
        alike.plot(heat, [x["floor"] for x in own], ":", color=COLORS[form])
        shares = [lines["closed"][n]["valid"] for n in there]
        valid.plot(heat, shares, "o-", color=COLORS[form], label=f"closed: right, {WORDS[form]}")
        exact = [line_of(results, "plain", form, t, "numbers_exact") for t in TEMPERATURES]
        mass = [line["valid"] for line in exact]
        name = f"a number from 1 to 10, {WORDS[form]}"
        valid.plot(TEMPERATURES, mass, "s--", color=COLORS[form], label=name)
    alike.set_title("How alike answers to one open prompt are\n(dotted: to different ones)")
    alike.set_ylabel("mean cosine of two answers")
    valid.set_title("What is left of validity")
    valid.set_ylabel("share of answers")
    valid.set_ylim(0, 1)
    for axis in (alike, valid):
        _plain(axis)
        axis.set_xlabel("temperature (top-p 0.9)")
        axis.set_xticks(TEMPERATURES, [f"{temperature:g}" for temperature in TEMPERATURES])
        axis.set_xlim(0.6, 2.1)
        axis.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _draw_stages(results: Results, path: Path) -> None:
    """What each stage did to open answers and to closed ones."""
    figure = _figure(10, 3.8)
    alike, right = figure.subplots(1, 2)
    for shift, form in zip((-0.08, 0.08), FORMATS):
        own = {
            stage: line_of(results, stage, form, COMPARED, "open")
            for stage in STAGES
            if line_of(results, stage, form, COMPARED, "open") is not None
        }
        places = [list(STAGES).index(stage) + shift for stage in own]
        values = [line["intra"] for line in own.values()]
        spread = [
            [value - line["intra_low"] for value, line in zip(values, own.values())],
            [line["intra_high"] - value for value, line in zip(values, own.values())],
        ]
        alike.errorbar(places, values, spread, fmt="o", color=COLORS[form], label=WORDS[form])
        floors = [line["floor"] for line in own.values()]
        alike.plot(places, floors, "_", markersize=14, color=COLORS[form])
        shares = [line_of(results, stage, form, COMPARED, "closed")["valid"] for stage in own]
        right.plot(places, shares, "o", color=COLORS[form], label=WORDS[form])
    alike.set_title("How alike open answers are, T 1 (dash: floor)")
    right.set_title("Closed answers that are right, T 1")
    alike.set_ylim(0, 0.27)
    right.set_ylim(0, 0.65)
    for axis in (alike, right):
        _plain(axis)
        axis.set_xticks(range(len(STAGES)), [STAGE_WORDS[stage] for stage in STAGES])
        axis.legend(fontsize=8, frameon=False, loc="upper left")
    _save(figure, path)

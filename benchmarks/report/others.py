"""The simulator beside measurements, and records of any other name: plain tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from ringattn.benchmarks.report import plot, units
from ringattn.benchmarks.report.cells import Cell
from ringattn.benchmarks.report.charts import Mark, rows_chart
from ringattn.benchmarks.report.coverage import coverage, reasons
from ringattn.benchmarks.report.markup import Html, element, joined
from ringattn.benchmarks.report.points import Group, Point, groups_of, median
from ringattn.benchmarks.report.tables import Column, table

MOST_COLUMNS = 7
_UNITS = (
    ("bytes", "bytes"), ("seconds", "s"), ("share", "share"), ("s", "s"), ("tflops", "TFLOP/s"),
)  # fmt: skip
_SKIPPED = ("simulated", "command", "suite", "losses")


def simulated_section(cells: Sequence[Cell]) -> Html:
    """The simulator's figures beside measured ones, by mask and method."""
    groups = groups_of("simulated", cells)
    names = list(dict.fromkeys(name for group in groups for name in group.variants))
    charts = [
        _chart(group, ranks, direction, names)
        for group in groups
        for ranks in group.ranks
        for direction in group.directions
    ]
    middle = [_middle(unit, cells) for unit in dict.fromkeys(c.record.unit for c in cells)]
    return joined(
        element("p", f"{units.counted(len(cells), 'cell')}. ", "; ".join(filter(None, middle))),
        plot.legend(names), plot.panels([c for c in charts if c]), plain_tables(cells),
        element("h3", "Coverage"), coverage("simulated", cells),
    )  # fmt: skip


def _middle(unit: str, cells: Sequence[Cell]) -> str:
    """The median, and of signed errors that of their sizes."""
    values = [c.record.value for c in cells if c.record.unit == unit and c.record.value is not None]
    middle, size = median(values), median(abs(value) for value in values)
    if middle is None or size is None:
        return ""
    text = f"{unit}: median {units.number(middle)}"
    return f"{text}, median size {units.number(size)}" if min(values) < 0 else text


def _chart(group: Group, ranks: int, direction: str, names: Sequence[str]) -> Html:
    """One panel: a row per mask, a mark per method."""
    here = [p for p in group.points if (p.ranks, p.direction) == (ranks, direction)]
    rows = [(mask, _marks((p for p in here if p.mask == mask), names)) for mask in group.masks]
    title = f"{group.unit}, {units.count(ranks)} rank{'s' * (ranks > 1)}"
    title += f", {direction}" if len(group.directions) > 1 else ""
    return rows_chart(title, rows, group.unit, names)


def _marks(points: Iterable[Point], names: Sequence[str]) -> list[Mark]:
    return [
        Mark(
            names.index(point.variant), point.value, None,
            f"{point.mask}, {point.variant}: {units.number(point.value)}",
        )
        for point in points
        if point.value is not None
    ]  # fmt: skip


def other_section(cells: Sequence[Cell]) -> Html:
    """Tables of records that belong to no suite, and why some have no figure."""
    return joined(plain_tables(cells), reasons(cells))


def plain_tables(cells: Sequence[Cell]) -> Html:
    """A table per unit: cases, figures with bars, and what else tells the cases apart."""
    tables = []
    for unit in dict.fromkeys(cell.record.unit for cell in cells):
        part = [cell for cell in cells if cell.record.unit == unit]
        columns = [
            Column("case", [cell.record.case for cell in part]),
            Column("figure", [cell.record.value for cell in part], unit, bars=True),
            Column(
                "±",
                [cell.record.spread for cell in part],
                unit,
                like=[c.record.value for c in part],
            ),
            *_figures(part),
            *_settings(part),
            Column("no figure", [cell.record.reason[:240] for cell in part]),
        ]
        tables.append(table(columns, summary=f"Figures in {unit}"))
    return joined(*tables)


def _figures(cells: Sequence[Cell]) -> list[Column]:
    names = dict.fromkeys(name for cell in cells for name in cell.figures)
    return [
        Column(name.replace("_", " "), [cell.figures.get(name) for cell in cells], _unit(name))
        for name in names
    ]


def _unit(name: str) -> str:
    return next((u for end, u in _UNITS if name == end or name.endswith(f"_{end}")), "")


def _settings(cells: Sequence[Cell]) -> list[Column]:
    """Columns for the keys of the configs that differ between cases, the first few."""
    columns = []
    keys = dict.fromkeys(key for cell in cells for key in cell.config if key not in _SKIPPED)
    for key in keys:
        values = [cell.config.get(key) for cell in cells]
        plain = all(value is None or isinstance(value, str | int | float) for value in values)
        if not plain or len({str(value) for value in values}) < 2:
            continue
        numbers = all(value is None or _is_number(value) for value in values)
        shown: list[Any] = values if numbers else ["" if v is None else str(v) for v in values]
        columns.append(Column(str(key).replace("_", " "), shown, _unit(key) if numbers else None))
    return columns[:MOST_COLUMNS]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300

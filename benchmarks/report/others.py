"""The simulator beside measurements, and records of any other name: plain tables."""

from collections.abc import Sequence
from typing import Any

from ringattn.benchmarks.report import plot, units
from ringattn.benchmarks.report.cells import Cell
from ringattn.benchmarks.report.charts import Mark, rows_chart
from ringattn.benchmarks.report.coverage import coverage, reasons
from ringattn.benchmarks.report.markup import Html, element, joined
from ringattn.benchmarks.report.points import groups_of, median
from ringattn.benchmarks.report.tables import Column, table

MOST_COLUMNS = 7
_UNITS = (("_bytes", "bytes"), ("seconds", "s"), ("_share", "share"), ("_s", "s"), ("tflops", "TFLOP/s"))
_SKIPPED = ("simulated", "command", "suite", "losses")


def simulated_section(cells: Sequence[Cell]) -> Html:
    """The simulator's figures beside measured ones, by mask and method."""
    charts, names = [], list(dict.fromkeys(c.text("method") or c.contender for c in cells))
    for group in groups_of("methods", cells):
        for ranks in group.ranks:
            rows = [
                (mask, _marks([p for p in group.points if (p.mask, p.ranks) == (mask, ranks)], names, group.unit))
                for mask in group.masks
            ]
            charts.append(rows_chart(f"{group.unit}: {ranks} ranks", rows, group.unit, names))
    middle = [
        f"{unit}: median {units.number(value)}"
        for unit in dict.fromkeys(c.record.unit for c in cells)
        if (value := median(c.record.value for c in cells if c.record.unit == unit)) is not None
    ]
    return joined(
        element("p", f"Over {units.count(len(cells))} cells. ", "; ".join(middle)),
        plot.legend(names), plot.panels([c for c in charts if c]), plain_tables(cells),
        element("h3", "Coverage"), coverage("methods", cells),
    )  # fmt: skip


def _marks(points, names: Sequence[str], unit: str) -> list[Mark]:
    marks = []
    for point in points:
        if point.value is not None and point.variant in names:
            tip = f"{point.mask}, {point.variant}: {units.scale_of([point.value], unit).with_unit(point.value)}"
            marks.append(Mark(names.index(point.variant), point.value, point.spread, tip))
    return marks


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
            Column("±", [cell.record.spread for cell in part], unit),
            *_figures(part), *_settings(part),
            Column("no figure", [cell.record.reason[:240] for cell in part]),
        ]  # fmt: skip
        tables.append(table(columns, summary=f"Figures in {unit}"))
    return joined(*tables)


def _figures(cells: Sequence[Cell]) -> list[Column]:
    names = dict.fromkeys(name for cell in cells for name in cell.figures)
    return [
        Column(name.replace("_", " "), [cell.figures.get(name) for cell in cells], _unit(name))
        for name in names
    ]


def _unit(name: str) -> str:
    return next((unit for end, unit in _UNITS if name.endswith(end)), "")


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
        columns.append(Column(key.replace("_", " "), shown, _unit(key) if numbers else None))
    return columns[:MOST_COLUMNS]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

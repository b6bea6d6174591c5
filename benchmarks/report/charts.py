"""The two kinds of charts: marks in rows, and lines."""

from collections.abc import Sequence
from dataclasses import dataclass

from ringattn.benchmarks.report import plot, units
from ringattn.benchmarks.report.markup import Html, element, joined

_ROW, _LINES_HEIGHT, _LABEL = 26, 250, 24
MOST_ROWS = 60  # of one chart
_MOST_POINTS = 240  # of a line that is drawn; longer ones are thinned


@dataclass(frozen=True)
class Mark:
    """A figure in a row: the number of its series, its value and spread, and what it is."""

    series: int
    value: float
    spread: float | None = None
    tip: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """A line: the number and name of its series, and its points in order of x."""

    series: int
    name: str
    points: tuple[tuple[float, float], ...]
    simulated: bool = False


def rows_chart(
    title: str, rows: Sequence[tuple[str, Sequence[Mark]]], unit: str, names: Sequence[str]
) -> Html:
    """Marks of several series, one row per label, over one axis.

    Args:
        title: of the chart.
        rows: label and marks of each; rows without marks are left out.
        unit: of the values, as in a record.
        names: of the series, for the description.
    """
    rows = [(label, marks) for label, marks in rows if marks]
    if not rows:
        return Html()
    left_out, rows = len(rows) - MOST_ROWS, rows[:MOST_ROWS]
    if left_out > 0:
        title = f"{title} ({left_out:,} more rows are in the tables)"
    scale = units.scale_of((mark.value for _, marks in rows for mark in marks), unit)
    left = min(max(plot.width_of(label[:_LABEL]) for label, _ in rows) + 10, 172)
    values = [mark.value / scale.divisor for _, marks in rows for mark in marks]
    axis = plot.axis(values, left, plot.WIDTH - 22, log="%" not in scale.unit)
    bottom = _ROW * len(rows) + 6
    parts = [_columns(axis, bottom)]
    for number, (label, marks) in enumerate(rows):
        middle = _ROW * number + _ROW / 2 + 4
        shown = plot.shortened(label, _LABEL)
        name = plot.text(left - 8, middle + 4, shown, "end", "name")
        parts.append(plot.line(left, middle, plot.WIDTH - 22, middle, "row"))
        parts.append(name if shown == label else element("g", element("title", label), name))
        parts.append(_row(axis, middle, marks, scale))
    label = scale.unit + (", log scale" if axis.log else "")
    parts.append(plot.text((left + plot.WIDTH - 22) / 2, bottom + 34, label, "middle", "unit"))
    low, high = (scale.with_unit(edge * scale.divisor) for edge in (min(values), max(values)))
    description = f"{len(rows)} rows by {', '.join(names)}; {low} to {high}"
    return plot.figure(title, description, bottom + 40, *parts)


def _columns(axis: plot.Axis, bottom: float) -> Html:
    """Vertical lines at the ticks and their labels below."""
    lines = [plot.line(axis.at(v), 2, axis.at(v), bottom, "grid") for v, _ in axis.ticks]
    labels = [
        plot.text(axis.at(value), bottom + 16, label, "middle", "tick")
        for value, label in axis.ticks
    ]
    return joined(*lines, *labels)


def _row(axis: plot.Axis, middle: float, marks: Sequence[Mark], scale: units.Scale) -> Html:
    """A row's marks; those that would cover each other are set above one another."""
    places = [axis.at(mark.value / scale.divisor) for mark in marks]
    offsets = plot.spread_apart(places, 7)
    span = max((abs(offset) for offset in offsets), default=0)
    step = min(4.5, (_ROW / 2 - 5) / span) if span else 0
    parts = []
    for mark, x, offset in zip(marks, places, offsets, strict=True):
        y = round(middle + step * offset, 1)
        if mark.spread:
            ends = [axis.at((mark.value + s * mark.spread) / scale.divisor) for s in (-1, 1)]
            if ends[1] - ends[0] > 9:
                kind = f"spread c{mark.series % plot.COLORS}"
                parts.append(plot.line(ends[0], y, ends[1], y, kind))
        parts.append(plot.marker(mark.series, x, y, mark.tip, hollow=mark.hollow))
    return joined(*parts)


def lines_chart(
    title: str, lines: Sequence[Line], x_label: str, unit: str, *, steps: bool = False
) -> Html:
    """Lines over one pair of axes.

    Args:
        title: of the chart.
        lines: those without points are left out.
        x_label: what x is.
        unit: of y, as in a record.
        steps: x counts steps from zero and y need not start at zero; else x is a number of ranks.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Html()
    scale = units.scale_of((y for line in lines for _, y in line.points), unit)
    bottom = _LINES_HEIGHT - 44
    ys = [y / scale.divisor for line in lines for _, y in line.points]
    up = plot.axis(ys, bottom, 24, zero=not steps)
    left = max(plot.width_of(label) for _, label in up.ticks) + 16
    xs = [x for line in lines for x, _ in line.points]
    start, stop = left + 6, plot.WIDTH - 18
    across = plot.axis(xs, start, stop, log=False) if steps else plot.powers_axis(xs, start, stop)
    parts = [_frame(across, up, left, bottom)]
    parts.append(plot.text(2, 12, scale.unit + (", log scale" if up.log else ""), class_="unit"))
    middle = (left + plot.WIDTH - 18) / 2
    parts.append(plot.text(middle, _LINES_HEIGHT - 8, x_label, "middle", "unit"))
    parts += [_line(line, across, up, scale, marks=not steps) for line in lines]
    low, high = (scale.with_unit(edge * scale.divisor) for edge in (min(ys), max(ys)))
    names = ", ".join(dict.fromkeys(line.name for line in lines))
    description = f"Lines of {names}; {low} to {high}"
    return plot.figure(title, description, _LINES_HEIGHT, *parts)


def _frame(across: plot.Axis, up: plot.Axis, left: float, bottom: float) -> Html:
    parts = []
    for value, label in up.ticks:
        y = up.at(value)
        parts.append(plot.line(left, y, plot.WIDTH - 12, y, "grid"))
        parts.append(plot.text(left - 6, y + 4, label, "end", "tick"))
    for value, label in across.ticks:
        x = across.at(value)
        parts.append(plot.line(x, bottom, x, bottom + 4, "axis"))
        parts.append(plot.text(x, bottom + 18, label, "middle", "tick"))
    return joined(*parts)


def _line(line: Line, across: plot.Axis, up: plot.Axis, scale: units.Scale, *, marks: bool) -> Html:
    every = -(-len(line.points) // _MOST_POINTS)
    kept = line.points[:: max(every, 1)]
    if kept[-1] != line.points[-1]:
        kept = (*kept, line.points[-1])
    placed = [(across.at(x), up.at(y / scale.divisor)) for x, y in kept]
    kind = f"line c{line.series % plot.COLORS}" + (" dashed" if line.simulated else "")
    parts: list[object] = [plot.path(placed, kind)]
    shown = list(zip(placed, kept, strict=True))
    for (px, py), (x, y) in shown if marks else shown[-1:]:
        tip = f"{line.name}, {units.count(x)}: {scale.with_unit(y)}"
        parts.append(plot.marker(line.series, px, py, tip, hollow=line.simulated))
    return joined(*parts)

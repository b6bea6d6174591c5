"""The suites of attention alone: kernels, methods, masks."""

from collections.abc import Callable, Sequence

from ringattn.benchmarks.report import plot, units
from ringattn.benchmarks.report.cells import Cell
from ringattn.benchmarks.report.charts import Mark, rows_chart
from ringattn.benchmarks.report.coverage import coverage
from ringattn.benchmarks.report.markup import Html, element, folded, joined, paragraph
from ringattn.benchmarks.report.points import Group, Point, groups_of
from ringattn.benchmarks.report.tables import Column, heat, table

MOST_OPEN = 3  # settings shown without a click
MOST_GROUPS = 24
MOST_SERIES = 14  # in one chart
_SIDE_FIGURES = (
    ("Peak memory of a rank", "peak_bytes", "bytes"),
    ("Bytes received by the busiest rank", "wire_bytes", "bytes"),
    ("Communication that computing does not hide", "exposed_share", "share"),
)


def attention_section(suite: str, cells: Sequence[Cell]) -> Html:
    """Pictures and tables of every setting of a suite, then its coverage."""
    groups = groups_of(suite, cells)
    parts = [
        _group(group, opened=number < MOST_OPEN)
        for number, group in enumerate(groups[:MOST_GROUPS])
    ]
    note = None
    if len(groups) > MOST_GROUPS:
        left = sum(len(group.points) for group in groups[MOST_GROUPS:])
        rest = f"{len(groups) - MOST_GROUPS} settings with {left:,} points are left out here."
        note = paragraph(rest, class_="note")
    return joined(*parts, note, element("h3", "Coverage"), coverage(suite, cells))


def _group(group: Group, *, opened: bool) -> Html:
    content = joined(_speeds(group), _side_charts(group), _points_table(group))
    label = "simulated" if group.simulated else "measured"
    title = joined(group.title, " ", element("span", label, class_=f"tag {label}"))
    return folded(title, element("div", content), opened=opened) if not opened else joined(
        element("h3", title), content
    )


def _speeds(group: Group) -> Html:
    """The headline figure by mask and variant, for every number of ranks and direction."""
    shown, rest = [], []
    names = _series(group)
    for direction in group.directions:
        charts, grids = [], []
        for ranks in group.ranks:
            title = _panel_title(group, ranks, direction)
            charts.append(
                _chart(f"{title}", group, ranks, direction, lambda p: p.value, group.unit)
            )
            if len(group.variants) > 1:
                grids.append(heat(group, ranks, direction, title))
        part = joined(plot.panels([c for c in charts if c]), *grids)
        if part:
            (shown if direction == group.directions[0] else rest).append(part)
    key = plot.legend(names) if shown else None
    more = folded("Forward and backward by themselves", *rest) if rest else None
    return joined(key, *shown, more)


def _panel_title(group: Group, ranks: int, direction: str) -> str:
    words = {"both": "forward and backward"}.get(direction, direction)
    where = f", {units.count(ranks)} rank{'s' * (ranks > 1)}" if group.ranks != [1] else ""
    return f"{_headline(group)}: {words}{where}"


def _headline(group: Group) -> str:
    return {"TFLOP/s": "Speed per rank", "s": "Time (less is better)"}.get(group.unit, group.unit)


def _series(group: Group) -> list[str]:
    """Variants that charts show: those with most figures where there are too many."""
    names = group.variants
    if len(names) <= MOST_SERIES:
        return names
    counts = {name: 0 for name in names}
    for point in group.points:
        counts[point.variant] += point.value is not None
    kept = set(sorted(names, key=lambda name: -counts[name])[:MOST_SERIES])
    return [name for name in names if name in kept]


def _chart(
    title: str,
    group: Group,
    ranks: int,
    direction: str,
    figure: Callable[[Point], float | None],
    unit: str,
) -> Html:
    """One panel: a row per mask, a mark per variant."""
    names = _series(group)
    rows = []
    for mask in group.masks:
        marks = []
        for number, name in enumerate(names):
            point = group.best(mask, name, ranks, direction)
            value = figure(point) if point is not None else None
            if point is not None and value is not None:
                spread = point.spread if unit == group.unit else None
                scale = units.scale_of([value], unit)
                layout = f" over {point.layout}" if point.layout else ""
                tip = f"{mask}, {name}{layout}: {scale.with_unit(value)}"
                marks.append(Mark(number, value, spread, tip, group.simulated))
        rows.append((mask, marks))
    return rows_chart(title, rows, unit, names)


def _side_charts(group: Group) -> Html:
    """Memory, bytes, exposed communication and error, at the largest number of ranks."""
    charts = []
    for title, name, unit in _SIDE_FIGURES:
        charts.append(_largest(title, group, lambda p, name=name: p.figure(name), unit))
    charts.append(
        _largest(
            "Largest error against float64", group, lambda p: p.error[1] if p.error else None,
            "relative error",
        )
    )  # fmt: skip
    charts = [chart for chart in charts if chart]
    if not charts:
        return Html()
    return joined(
        element("h4", "Memory, communication, error"), plot.legend(_series(group)),
        plot.panels(charts),
    )  # fmt: skip


def _largest(
    title: str, group: Group, figure: Callable[[Point], float | None], unit: str
) -> Html:
    """A chart of the most ranks, and the first direction, that have such a figure."""
    found = {
        (point.ranks, point.direction)
        for point in group.points
        if figure(point) not in (None, 0)
    }
    for ranks in reversed(group.ranks):
        for direction in group.directions:
            if (ranks, direction) in found:
                where = _panel_title(group, ranks, direction).partition(": ")[2]
                return _chart(f"{title}: {where}", group, ranks, direction, figure, unit)
    return Html()


def _points_table(group: Group) -> Html:
    """Every point with all its figures, or why it has none."""
    points = group.points
    several = any(len(point.cells) > 1 for point in points)
    base = {point.variant for point in map(group.baseline, points) if point is not None}
    columns = [
        Column("mask", [p.mask for p in points]),
        Column("", [p.variant for p in points]),
        Column("layout", [p.layout for p in points]),
        Column("ranks", [p.ranks for p in points], ""),
        Column("direction", [p.direction for p in points]),
        Column(
            "speed" if group.unit == "TFLOP/s" else "figure", [p.value for p in points], group.unit,
            bars=True,
        ),
        Column("±", [p.spread for p in points], group.unit),
        Column(f"of {' or '.join(sorted(base))}", [group.ratio(p) for p in points], "share"),
        Column("time", [p.figure("seconds") for p in points], "s"),
        Column("CPU time", [p.figure("cpu_seconds") for p in points], "s"),
        Column("peak memory", [p.figure("peak_bytes") for p in points], "bytes"),
        Column("received", [p.figure("wire_bytes") for p in points], "bytes"),
        Column("exposed", [p.figure("exposed_share") for p in points], "share"),
        Column("error", [p.error[1] if p.error else None for p in points], ""),
        Column("of", [p.error[0] if p.error else "" for p in points]),
        Column("packs", [len(p.cells) if several else None for p in points], ""),
        Column("no figure", [_why(p) for p in points]),
    ]  # fmt: skip
    return table(columns, summary="All figures")


def _why(point: Point) -> str:
    """The reasons of a point in short."""
    if not point.reasons:
        return ""
    text = "; ".join(point.reasons)
    text = text if len(text) <= 240 else text[:239] + "…"
    word = point.status if point.value is None else "partly"
    return f"{word}: {text}"

"""The suites of attention alone: kernels, methods, masks."""

from collections import Counter
from collections.abc import Callable, Sequence

from ringattn.benchmarks.report import plot, units
from ringattn.benchmarks.report.cells import Cell
from ringattn.benchmarks.report.charts import Mark, rows_chart
from ringattn.benchmarks.report.coverage import coverage
from ringattn.benchmarks.report.markup import Html, element, folded, joined, paragraph
from ringattn.benchmarks.report.points import Group, Point, groups_of
from ringattn.benchmarks.report.tables import MOST_ROWS, Column, heat, table

MOST_OPEN = 3  # settings shown without a click
MOST_GROUPS = 12
MOST_SERIES = 8  # in one chart; where there are more, the six best
MOST_RANKS = 4  # numbers of ranks with charts, the largest ones
_SUITE_ROWS = 3600  # of all tables of a suite
_SIDE_FIGURES = (
    ("CPU time, one process = 1", "cpu_ratio", "ratio"),
    ("Peak memory of a rank", "peak_bytes", "bytes"),
    ("Bytes received by the busiest rank", "wire_bytes", "bytes"),
    ("Communication not hidden", "exposed_share", "share"),
)


def attention_section(suite: str, cells: Sequence[Cell]) -> Html:
    """Pictures and tables of every setting of a suite, then its coverage."""
    groups = groups_of(suite, cells)
    parts, rows = [], _SUITE_ROWS
    for number, group in enumerate(groups[:MOST_GROUPS]):
        parts.append(_group(group, min(rows, MOST_ROWS), opened=number < MOST_OPEN))
        rows = max(rows - len(group.points), 0)
    note = None
    if len(groups) > MOST_GROUPS:
        left = sum(len(group.points) for group in groups[MOST_GROUPS:])
        rest = f"{len(groups) - MOST_GROUPS} settings with {left:,} points are left out here."
        note = paragraph(rest, class_="note")
    return joined(*parts, note, element("h3", "Coverage"), coverage(suite, cells))


def _group(group: Group, rows: int, *, opened: bool) -> Html:
    content = joined(_speeds(group, full=opened), _side_charts(group), _points_table(group, rows))
    label = "simulated" if group.simulated else "measured"
    title = joined(group.title, " ", element("span", label, class_=f"tag {label}"))
    return joined(element("h3", title), content) if opened else folded(title, content)


def _speeds(group: Group, *, full: bool) -> Html:
    """The headline figure by mask and variant, for every number of ranks and direction.

    With several numbers of ranks, directions but the first are folded away; they are left to the
    table where not `full`.
    """
    names = _series(group)
    ranks = group.ranks[-MOST_RANKS:]
    first, others = group.directions[:1], group.directions[1:]
    if len(ranks) == 1:
        first, others = first + others, []
    shown = joined(*_panels(group, ranks, first, names))
    if not shown:
        return Html()
    more = _panels(group, ranks, others, names) if full else []
    return joined(
        plot.legend(names), _selection(group, names), shown,
        folded("Forward and backward by themselves", *more) if any(more) else None,
    )  # fmt: skip


def _panels(
    group: Group, ranks: Sequence[int], directions: Sequence[str], names: Sequence[str]
) -> list[Html]:
    """Charts in a row, then shaded tables: those of the most ranks, and others folded away."""
    parts = []
    cells = [(direction, p) for direction in directions for p in ranks]
    charts = [
        _chart(_title(group, p, d), group, p, d, lambda q: q.value, group.unit, names)
        for d, p in cells
    ]
    parts.append(plot.panels([chart for chart in charts if chart]))
    if len(group.variants) > 1:
        grids = {(d, p): heat(group, p, d, _title(group, p, d)) for d, p in cells}
        last = joined(*[grid for (_, p), grid in grids.items() if p == ranks[-1]])
        rest = joined(*[grid for (_, p), grid in grids.items() if p != ranks[-1]])
        fewer = " and ".join(units.count(p) for p in ranks[:-1])
        parts.append(element("div", last, class_="beside") if last else Html())
        if rest:
            beside = element("div", rest, class_="beside")
            parts.append(folded(f"The same on {fewer} rank{'s' * (fewer != '1')}", beside))
    return parts


def _title(group: Group, ranks: int, direction: str) -> str:
    where = f", {units.count(ranks)} rank{'s' * (ranks > 1)}" if group.ranks != [1] else ""
    return f"{_headline(group)}: {direction_words(direction)}{where}"


def direction_words(direction: str) -> str:
    """A direction as people say it."""
    return {"both": "forward and backward"}.get(direction, direction)


def _headline(group: Group) -> str:
    return {"TFLOP/s": "Speed per rank", "s": "Time"}.get(group.unit, group.unit)


def _series(group: Group) -> list[str]:
    """Variants that charts show: where there are many, those that are the fastest most often."""
    names = group.variants
    if len(names) <= MOST_SERIES:
        return names
    wins: Counter[str] = Counter()
    for point in group.points:
        if point.value is not None:
            wins[point.variant] += 1
    for direction in group.directions:
        for ranks in group.ranks:
            for mask in group.masks:
                row = [group.best(mask, name, ranks, direction) for name in names]
                winner = group.fastest([point for point in row if point is not None])
                if winner is not None:
                    wins[winner.variant] += len(group.points)
    kept = {*names[:1], *sorted(names[1:], key=lambda name: -wins[name])[: MOST_SERIES - 3]}
    return [name for name in names if name in kept]


def _selection(group: Group, names: Sequence[str]) -> Html | None:
    """What charts leave out."""
    notes = []
    if len(names) < len(group.variants):
        notes.append(
            f"Charts show {names[0]} and the {len(names) - 1} that are the best most often; all "
            f"{len(group.variants)} are in the tables."
        )
    if len(group.ranks) > MOST_RANKS:
        fewer = ", ".join(units.count(p) for p in group.ranks[:-MOST_RANKS])
        notes.append(f"Figures of {fewer} ranks are in the table only.")
    return paragraph(" ".join(notes), class_="note") if notes else None


def _chart(
    title: str,
    group: Group,
    ranks: int,
    direction: str,
    figure: Callable[[Point], float | None],
    unit: str,
    names: Sequence[str],
) -> Html:
    """One panel: a row per mask, a mark per variant."""
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
    names = _series(group)
    charts = [
        _largest(title, group, lambda p, name=name: p.figure(name), unit, names)
        for title, name, unit in _SIDE_FIGURES
    ]
    errors = _largest(
        "Largest error against float64", group, lambda p: p.error[1] if p.error else None,
        "relative error", names,
    )  # fmt: skip
    charts = [chart for chart in (*charts, errors) if chart]
    if not charts:
        return Html()
    head = element("h4", "Cost, memory, communication, error")
    return joined(head, plot.legend(names), plot.panels(charts))


def _largest(
    title: str,
    group: Group,
    figure: Callable[[Point], float | None],
    unit: str,
    names: Sequence[str],
) -> Html:
    """A chart of the most ranks, and the first direction, that have such a figure."""
    found = {
        (point.ranks, point.direction) for point in group.points if figure(point) not in (None, 0)
    }
    for ranks in reversed(group.ranks):
        for direction in group.directions:
            if (ranks, direction) in found:
                where = _title(group, ranks, direction).partition(": ")[2]
                return _chart(f"{title}: {where}", group, ranks, direction, figure, unit, names)
    return Html()


def _points_table(group: Group, rows: int) -> Html:
    """Every point with all its figures, or why it has none."""
    points = group.points
    several = any(len(point.cells) > 1 for point in points)
    base = {point.variant for point in map(group.baseline, points) if point is not None}
    columns = [
        Column("mask", [p.mask for p in points]),
        Column("who", [p.variant for p in points]),
        Column("layout", [p.layout for p in points]),
        Column("ranks", [p.ranks for p in points], ""),
        Column("direction", [p.direction for p in points]),
        Column(
            "speed" if group.unit == "TFLOP/s" else "figure", [p.value for p in points], group.unit,
            bars=True,
        ),
        Column("±", [p.spread for p in points], group.unit, like=[p.value for p in points]),
        Column(f"of {' or '.join(sorted(base))}", [group.ratio(p) for p in points], "share"),
        Column("CPU time/one process", [p.figure("cpu_ratio") for p in points], ""),
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
    return table(columns, summary="All figures", most=rows)


def _why(point: Point) -> str:
    """The reasons of a point in short."""
    if not point.reasons:
        return ""
    text = "; ".join(point.reasons)
    text = text if len(text) <= 240 else text[:239] + "…"
    word = point.status if point.value is None else "partly"
    return f"{word}: {text}"

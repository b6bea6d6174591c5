"""The suite scaling: figures by the number of ranks, weak and strong, measured and simulated."""

from collections.abc import Mapping, Sequence

from ringattn.benchmarks.report import plot, units
from ringattn.benchmarks.report.cells import Cell
from ringattn.benchmarks.report.charts import Line, Mark, lines_chart, rows_chart
from ringattn.benchmarks.report.coverage import coverage
from ringattn.benchmarks.report.markup import Html, element, joined, paragraph
from ringattn.benchmarks.report.points import median, variant_of
from ringattn.benchmarks.report.tables import Column, table

MOST_PANELS = 30
PLAIN_LINKS = ("", "as they are")


def scaling_section(cells: Sequence[Cell]) -> Html:
    """Curves by kind and unit, the effect of other links, a table, and the coverage."""
    names = list(dict.fromkeys(variant_of("scaling", cell, True) for cell in cells))
    series = {name: number for number, name in enumerate(names)}
    plain = [cell for cell in cells if cell.text("links") in PLAIN_LINKS]
    parts = [_curves(kind, plain, series) for kind in ("weak", "strong", "other")]
    other = [cell for cell in cells if cell.text("links") not in PLAIN_LINKS and cell.ok]
    return joined(
        *parts, _links(plain, other, series), _table(cells),
        element("h3", "Coverage"), coverage("scaling", cells),
    )  # fmt: skip


def kind_of(cell: Cell) -> str:
    """weak (as many tokens per rank), strong (as many in all), or other where it is not said."""
    for key in ("scaling", "kind", "mode"):
        if cell.text(key) in ("weak", "strong"):
            return cell.text(key)
    return "other"


def _curves(kind: str, cells: Sequence[Cell], series: Mapping[str, int]) -> Html:
    found: dict[tuple[str, str, str], list[Cell]] = {}
    directions = {cell.direction for cell in cells}
    shown = "both" if "both" in directions else min(directions, default="both")
    for cell in cells:
        if kind_of(cell) == kind and cell.ok and cell.direction == shown:
            key = (cell.record.unit, cell.mask, _tokens(kind, cell))
            found.setdefault(key, []).append(cell)
    if not found:
        return Html()
    heads = {
        "weak": "Weak scaling: as many tokens per rank",
        "strong": "Strong scaling: as many tokens in all",
        "other": "By number of ranks",
    }
    both = {cell.simulated for part in found.values() for cell in part}
    charts = [
        lines_chart(f"{mask}, {tokens}", _lines(part, series), "ranks or GPUs", unit)
        for (unit, mask, tokens), part in list(found.items())[:MOST_PANELS]
    ]
    left = len(found) - MOST_PANELS
    note = paragraph(f"{left} more charts are left out.", class_="note") if left > 0 else None
    return joined(
        element("h3", heads[kind]), plot.legend(list(series), simulated=True in both),
        plot.panels(charts), note,
    )  # fmt: skip


def _tokens(kind: str, cell: Cell) -> str:
    """The tokens that a curve keeps: of a rank or in all."""
    length = cell.whole("seq_len")
    if kind == "strong":
        return f"{units.tokens(length)} tokens"
    if kind == "weak" and length:
        group = cell.whole("cp") or cell.ranks
        return f"{units.tokens(length // group)} tokens per rank"
    return cell.direction


def _lines(cells: Sequence[Cell], series: Mapping[str, int]) -> list[Line]:
    """A line per variant, measured and simulated apart; the median where a place has several."""
    found: dict[tuple[str, bool], dict[int, list[float | None]]] = {}
    for cell in cells:
        key = (variant_of("scaling", cell, True), cell.simulated)
        found.setdefault(key, {}).setdefault(cell.ranks, []).append(cell.record.value)
    lines = []
    for (name, simulated), places in found.items():
        points = [(p, value) for p in sorted(places) if (value := median(places[p])) is not None]
        lines.append(Line(series[name], name, tuple(points), simulated))
    return lines


def _links(plain: Sequence[Cell], other: Sequence[Cell], series: Mapping[str, int]) -> Html:
    """How other links change the figure, in per cent, at the most ranks."""
    if not other:
        return Html()
    most = max(cell.ranks for cell in other)
    base = {_place(cell): cell.record.value for cell in plain if cell.ok}
    rows: dict[tuple[str, str], list[Mark]] = {}
    for cell in other:
        before, after = base.get(_place(cell)), cell.record.value
        if cell.ranks == most and before and after is not None:
            change = 100 * (after / before - 1)
            name = variant_of("scaling", cell, True)
            tip = f"{cell.mask}, {name}: {change:+.1f} %"
            mark = Mark(series[name], change, None, tip, cell.simulated)
            rows.setdefault((cell.text("links"), cell.mask), []).append(mark)
    charts = [
        rows_chart(
            f"Change with {links}, {units.count(most)} GPUs",
            [(mask, marks) for (name, mask), marks in rows.items() if name == links],
            "percent", list(series),
        )
        for links in dict.fromkeys(key[0] for key in rows)
    ]  # fmt: skip
    return joined(
        element("h3", "What other links would change"), plot.legend(list(series)),
        plot.panels(charts),
    )  # fmt: skip


def _place(cell: Cell) -> tuple[str, ...]:
    keys = (kind_of(cell), cell.mask, variant_of("scaling", cell, True), cell.record.unit)
    return (*keys, str(cell.ranks), str(cell.whole("seq_len")), str(cell.simulated))


def _table(cells: Sequence[Cell]) -> Html:
    unit = max({c.record.unit for c in cells}, key=lambda u: sum(c.record.unit == u for c in cells))
    same = [cell for cell in cells if cell.record.unit == unit]
    rest = [cell for cell in cells if cell.record.unit != unit]
    columns = [
        Column("who", [variant_of("scaling", c, True) for c in same]),
        Column("mask", [c.mask for c in same]),
        Column("kind", [kind_of(c) for c in same]),
        Column("ranks or GPUs", [c.ranks for c in same], ""),
        Column("tokens", [units.tokens(c.whole("seq_len")) for c in same]),
        Column("links", [c.text("links") for c in same]),
        Column("how", ["simulated" if c.simulated else "measured" for c in same]),
        Column("direction", [c.text("direction") for c in same]),
        Column("figure", [c.record.value for c in same], unit, bars=True),
        Column("MFU", [c.figures.get("mfu") for c in same], "share"),
        Column("per GPU", [c.figures.get("tflops") for c in same], "TFLOP/s"),
        Column("step", [c.figures.get("step_seconds") for c in same], "s"),
        Column("peak memory", [c.figures.get("peak_bytes") for c in same], "bytes"),
        Column("exposed", [c.figures.get("exposed_share") for c in same], "share"),
        Column("no figure", [c.record.reason[:240] for c in same]),
    ]
    shown = table(columns, summary=f"All figures in {unit}")
    return joined(shown, _table(rest)) if rest else shown

"""Tables: of figures, with units in their heads, and of shades by mask and variant."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringattn.benchmarks.report import units
from ringattn.benchmarks.report.markup import Html, element, folded, joined, paragraph
from ringattn.benchmarks.report.points import Group, Point

MOST_ROWS = 1200  # of one table
MOST_MASKS = 60  # rows of a grid
OPEN_ROWS = 24  # tables of no more rows are shown without a click
GLYPHS = {"ok": "✓", "refused": "R", "error": "✕", "missing": "·"}
WORDS = {
    "ok": "figure", "refused": "refused", "error": "error", "missing": "not in these results",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of numbers or of words.

    Attributes:
        head: its name.
        values: of every row, None where there is none; numbers in `unit`.
        unit: as in a record; None for words.
        bars: whether numbers have bars behind them, in proportion.
        like: numbers of another column, whose unit this one shares.
    """

    head: str
    values: Sequence[float | str | None]
    unit: str | None = None
    bars: bool = False
    like: Sequence[float | str | None] | None = None


def table(columns: Sequence[Column], *, summary: str, most: int = MOST_ROWS) -> Html:
    """A table that can be sorted and filtered where there is JavaScript, folded when long.

    Columns without any value are left out. Rows beyond `most` are left out, which it says.

    Args:
        columns: all of one length.
        summary: what the rows are, such as "All figures".
        most: rows shown.
    """
    rows = len(columns[0].values) if columns else 0
    if not rows:
        return Html()
    columns = [c for c in columns if any(value not in (None, "") for value in c.values)]
    heads, cells = [], []
    for column in columns:
        head, part = _column(column, most)
        heads.append(head)
        cells.append(part)
    lines = [element("tr", *line) for line in zip(*cells, strict=True)]
    whole = element(
        "table", element("thead", element("tr", *heads)), element("tbody", *lines), class_="figures"
    )
    note = None
    if rows > most:
        left = f"{rows - most:,} of {rows:,} rows are left out here; the files hold all of them."
        note = paragraph(left, class_="note")
    title = f"{summary} ({units.counted(rows, 'row')})"
    return folded(title, note, scrolled(whole), opened=rows <= OPEN_ROWS)


def _column(column: Column, most: int) -> tuple[Html, list[Html]]:
    """The head of a column and its cells."""
    shown = column.values[:most]
    if column.unit is None:
        cells = [element("td", "" if value is None else value) for value in shown]
        return element("th", column.head, scope="col"), cells
    numbers = [value for value in column.values if isinstance(value, int | float)]
    fitted = column.values if column.like is None else column.like
    scale = units.scale_of((v for v in fitted if isinstance(v, int | float)), column.unit)
    largest = max(numbers, default=0) if min(numbers, default=0) >= 0 else 0
    whole = scale.divisor == 1 and all(float(value).is_integer() for value in numbers)
    cells = []
    for value in shown:
        if not isinstance(value, int | float):
            cells.append(element("td", "–" if value is None else value, class_="n"))
            continue
        bar = f"--w:{100 * value / largest:.0f}%" if column.bars and largest else None
        text = units.count(value) if whole else scale.text(value)
        kind = "n bar" if bar else "n"
        cells.append(element("td", text, class_=kind, data_v=f"{value:.6g}", style=bar))
    unit = element("small", f" {scale.unit}") if scale.unit else None
    return element("th", column.head, unit, scope="col", class_="n"), cells


def scrolled(content: Html, class_: str = "scroll") -> Html:
    """Something wide, in a container that scrolls by itself."""
    return element("div", content, class_=class_, tabindex="0")


def heat(group: Group, ranks: int, direction: str, caption: str) -> Html:
    """Masks × variants, shaded by the share of the row's best; reasons on hover."""
    points = {
        (mask, variant): group.best(mask, variant, ranks, direction)
        for mask in group.masks
        for variant in group.variants
    }
    found = [point for point in points.values() if point is not None]
    if not any(point.value for point in found):
        return Html()
    scale = units.scale_of((point.value for point in found), group.unit)
    variants = [v for v in group.variants if any(points[mask, v] for mask in group.masks)]
    rows = []
    for mask in group.masks[:MOST_MASKS]:
        line = [points[mask, variant] for variant in variants]
        if any(line):
            cells = [_shade(point, line, group, scale) for point in line]
            rows.append(element("tr", element("th", mask, scope="row"), *cells))
    return grid(f"{caption}, {scale.unit}", variants, rows)


def _shade(point: Point | None, row: Sequence[Point | None], group: Group, scale: units.Scale):
    if point is None:
        return element("td", GLYPHS["missing"], class_="missing", title=WORDS["missing"])
    if point.value is None:
        tip = f"{WORDS[point.status]}: {'; '.join(point.reasons)[:400]}"
        return element("td", GLYPHS[point.status], class_=point.status, title=tip)
    values = [other.value for other in row if other is not None and other.value is not None]
    less = units.less_is_better(group.unit)
    best = min(values) if less else max(values)
    share = (best / point.value if less else point.value / best) if point.value and best else 1.0
    layout = f", layout {point.layout}" if point.layout else ""
    tip = f"{point.mask}, {point.variant}{layout}: {scale.with_unit(point.value)}"
    if len(row) > 1 and share < 1:
        tip += f", {100 * share:.0f} % of the row's best"
    number = scale.text(point.value)
    inner = element("b", number) if share >= 1 and len(values) > 1 else number
    shade = f"--h:{max(0, round(200 * share - 100))}%"  # none at half of the best
    return element("td", inner, class_="heat", style=shade, title=tip)


def grid(caption: str, heads: Sequence[str], rows: Sequence[Html]) -> Html:
    """A table of small cells with upright heads."""
    head = element(
        "tr", element("th", "mask", scope="col"),
        *[element("th", element("span", name), scope="col", class_="up") for name in heads],
    )  # fmt: skip
    body = element("tbody", *rows)
    table = element(
        "table", element("caption", caption), element("thead", head), body, class_="grid"
    )
    return scrolled(table, "scroll fits")


def list_limited(items: Sequence[str], most: int, *, show: Callable[[str], object] = str) -> Html:
    """Items separated by commas, the first ones, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    parts: list[object] = []
    for number, item in enumerate(items[:most]):
        parts += [", " if number else "", show(item)]
    return joined(*parts, more)

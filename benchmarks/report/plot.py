"""Parts of inline SVG charts: axes with round ticks, markers, a title and a description.

Charts are `WIDTH` units wide, the width of a phone, and colours are classes that the style sheet
sets for light and dark, so that text stays as large as the page's.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ringattn.benchmarks.report import units
from ringattn.benchmarks.report.markup import Html, element, joined

WIDTH = 380
COLORS = 7  # classes c0 … c6 of the style sheet
_CHAR = 6.7  # mean width of a character of a label, in units
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M-3.5 -3.5H3.5V3.5H-3.5Z",
    "M0 -4.6L4.4 3.4H-4.4Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.6L4.4 -3.4H-4.4Z",
    "M-4.6 -1.5H-1.5V-4.6H1.5V-1.5H4.6V1.5H1.5V4.6H-1.5V1.5H-4.6Z",
    "M-4.4 -2.6L0 -5L4.4 -2.6V2.6L0 5L-4.4 2.6Z",
)


@dataclass(frozen=True)
class Axis:
    """A scale from values to positions.

    Attributes:
        low, high: values at the ends. start, stop: their positions.
        log: whether equal distances are equal ratios.
        ticks: values that are labelled, with their labels.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """The position of a value, kept within the axis."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        share = (value - low) / (high - low)
        return round(self.start + (self.stop - self.start) * min(max(share, 0.0), 1.0), 1)


def axis(
    values: Iterable[float],
    start: float,
    stop: float,
    *,
    zero: bool = True,
    log: bool = True,
    most: int = 4,
) -> Axis:
    """An axis over values: logarithmic where all are positive and differ 40 times.

    Args:
        values: at least one.
        start: position of the low end.
        stop: position of the high end.
        zero: whether a linear axis starts at zero.
        log: whether it may be logarithmic.
        most: about as many ticks.
    """
    known = sorted(values)
    low, high = known[0], known[-1]
    if log and 0 < 40 * low < high:
        return _log_axis(low, high, start, stop, most)
    base, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    step = _round_step(max(high - base, abs(high) * 1e-3, 1e-12) / most)
    base = math.floor(base / step + 1e-9) * step
    top = max(math.ceil(high / step - 1e-9) * step, base + step)
    count = round((top - base) / step)
    ticks = tuple((base + k * step, units.short(base + k * step)) for k in range(count + 1))
    return Axis(base, top, start, stop, False, ticks)


def powers_axis(values: Iterable[float], start: float, stop: float) -> Axis:
    """A logarithmic axis that labels the values themselves, such as 1, 2, 4 ranks."""
    known = sorted(set(values))
    low, high = known[0], known[-1]
    if low <= 0:
        return axis(known, start, stop, zero=False)
    if low == high:
        low, high = low / 2, high * 2
    shown = known[:: max(1, math.ceil(len(known) / 6))]
    ticks = tuple((value, units.count(value)) for value in shown)
    return Axis(low, high, start, stop, True, ticks)


def _log_axis(low: float, high: float, start: float, stop: float, most: int) -> Axis:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / most))
    exponents = range(first, last + 1, every)
    ticks = tuple((10.0**e, units.short(10.0**e)) for e in exponents)
    return Axis(10.0**first, 10.0**last, start, stop, True, ticks)


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next((f * size for f in (1, 2, 2.5, 5) if step <= f * size * 1.0001), 10 * size)


def marker(series: int, x: float, y: float, tip: str = "", *, hollow: bool = False) -> Html:
    """The mark of a series: each has a colour, and after seven another shape.

    Args:
        series: number of the series.
        x: position.
        y: position.
        tip: shown when the pointer rests on it.
        hollow: a simulated figure.
    """
    shape = _SHAPES[(series + series // COLORS) % len(_SHAPES)]
    kind = f"m c{series % COLORS}" + (" hollow" if hollow else "")
    children = [element("title", tip)] if tip else []
    return element("path", *children, class_=kind, d=shape, transform=f"translate({x} {y})")


def text(x: float, y: float, words: str, anchor: str = "start", class_: str = "") -> Html:
    """A label; anchor is start, middle or end."""
    placed = anchor if anchor != "start" else None
    return element("text", words, x=x, y=y, text_anchor=placed, class_=class_ or None)


def width_of(words: str) -> float:
    """About how wide a label is."""
    return _CHAR * len(words)


def shortened(words: str, most: int) -> str:
    """The words, cut to so many characters."""
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> Html:
    """A line through points."""
    data = "M" + "L".join(f"{x} {y}" for x, y in points)
    return element("path", class_=class_, d=data)


def figure(title: str, description: str, height: float, *parts: object) -> Html:
    """A figure of one chart, with its title above and for readers of text its description.

    Args:
        title: heading.
        description: what the chart shows, in words.
        height: of the drawing, in units.
        parts: markup of the drawing.
    """
    drawing = element(
        "svg", element("title", title), element("desc", description), joined(*parts),
        viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=f"{title}. {description}",
    )  # fmt: skip
    return element("figure", element("figcaption", title), drawing, class_="chart")


def legend(names: Sequence[str], *, simulated: bool = False) -> Html:
    """The marks of the series by name; with `simulated` also what hollow ones are."""
    items = [element("li", _key(marker(number, 8, 8)), name) for number, name in enumerate(names)]
    if simulated:
        items.append(element("li", _key(marker(6, 8, 8)), "filled, solid: measured"))
        hollow = marker(6, 8, 8, hollow=True)
        items.append(element("li", _key(hollow), "hollow, dashed: simulated"))
    return element("ul", *items, class_="legend")


def _key(mark: Html) -> Html:
    return element(
        "svg", mark, viewBox="0 0 16 16", width=16, height=16, class_="key", aria_hidden="true"
    )


def panels(charts: Sequence[Html]) -> Html:
    """Charts side by side as far as the page is wide."""
    return element("div", *charts, class_="panels") if charts else Html()


def spread_apart(places: Sequence[float], least: float) -> list[float]:
    """Offsets across a row for marks that would cover each other; zero for those that stand alone.

    Args:
        places: positions along the row.
        least: distance at which two marks are still told apart.
    """
    order = sorted(range(len(places)), key=lambda k: places[k])
    runs: list[list[int]] = []
    for position, k in enumerate(order):
        if position and places[k] - places[order[position - 1]] < least:
            runs[-1].append(k)
        else:
            runs.append([k])
    offsets = [0.0] * len(places)
    for run in runs:
        for position, k in enumerate(run):
            offsets[k] = position - (len(run) - 1) / 2
    return offsets

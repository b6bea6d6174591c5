"""What the figures say, in a few sentences that are counted from them."""

from collections import Counter
from collections.abc import Sequence

from ringattn.benchmarks.report import units
from ringattn.benchmarks.report.attention import direction_words
from ringattn.benchmarks.report.cells import OWN, Cell
from ringattn.benchmarks.report.markup import Html, bullets, element, joined
from ringattn.benchmarks.report.points import (
    BASELINES,
    Group,
    Point,
    groups_of,
    median,
    variant_of,
)

_SETTINGS = 2  # of each suite


def findings(cells: Sequence[Cell]) -> Html:
    """A list of sentences; nothing where nothing can be compared."""
    lines: list[object] = []
    for suite in ("kernels", "methods", "masks", "train"):
        part = [cell for cell in cells if cell.suite == suite]
        groups = [group for group in groups_of(suite, part) if len(group.variants) > 1]
        lines += [_compared(suite, group) for group in groups[:_SETTINGS]]
    lines += _scaled([cell for cell in cells if cell.suite == "scaling" and cell.ok])
    lines += _errors(cells)
    lines = [line for line in lines if line]
    if lines and any("--settings smoke" in cell.text("command") for cell in cells):
        lines.append(
            "Among these are smoke runs: single and short, they show that everything runs and is "
            "right. Their speeds are no figures to quote."
        )
    head = element("h2", "What it says", id="findings")
    return joined(head, bullets(lines)) if lines else Html()


def _compared(suite: str, group: Group) -> Html:
    """Who is the fastest how often, at the most ranks; how far ours is from others."""
    direction, ranks = group.directions[0], group.ranks[-1]
    wins: Counter[str] = Counter()
    ratios: dict[str, list[float]] = {"auto": [], OWN: []}
    for mask in group.masks:
        row = [group.best(mask, variant, ranks, direction) for variant in group.variants]
        row = [point for point in row if point is not None and point.value]
        best = group.fastest(point for point in row if point.variant not in BASELINES)
        if best is None or len(row) < 2:
            continue
        wins[best.variant] += 1
        auto = [point for point in row if point.variant == "auto"]
        ratios["auto"] += [_times(group, point, best) for point in auto]
        ours = group.fastest(point for point in row if point.cells[0].contender == OWN)
        other = group.fastest(point for point in row if point.cells[0].contender != OWN)
        if ours is not None and other is not None:
            ratios[OWN].append(_times(group, ours, other))
    if not wins:
        return Html()
    total = sum(wins.values())
    most = ", ".join(f"{name} on {number}" for name, number in wins.most_common(4))
    where = [direction_words(direction) if suite != "train" else ""]
    where += [f"{units.count(ranks)} ranks" if ranks > 1 else "", "simulated" * group.simulated]
    about = ", ".join(part for part in where if part)
    text = f"fastest ({about}): {most} of {total} mask{'s' * (total > 1)}"
    text += _ratio_text("auto", ratios["auto"], "the best method")
    text += _ratio_text(OWN, ratios[OWN], "the best other")
    head = {"masks": "Masks and peers"}.get(suite, suite.capitalize())
    return joined(element("b", f"{head}: "), text, ".", element("small", group.title))


def _times(group: Group, point: Point, other: Point) -> float:
    """How many times as fast a point is as another."""
    ours, theirs = point.value or 1.0, other.value or 1.0
    return theirs / ours if units.less_is_better(group.unit) else ours / theirs


def _ratio_text(name: str, ratios: Sequence[float], other: str) -> str:
    middle = median(ratios)
    if middle is None:
        return ""
    text = f"; {name} is {units.number(middle)} × as fast as {other}"
    if len(ratios) == 1:
        return text
    return f"{text} in the median, {units.number(min(ratios))} × at worst"


def _scaled(cells: Sequence[Cell]) -> list[object]:
    """What is left at the most ranks, of the best method of each mask."""
    lines: list[object] = []
    plain = [cell for cell in cells if cell.text("links") in ("", "as they are")]
    for simulated in (False, True):
        part = [c for c in plain if c.simulated == simulated and c.direction == "both"]
        most = max((cell.ranks for cell in part), default=0)
        best: dict[str, Cell] = {}
        for cell in part:
            value = cell.record.value or 0.0
            known = best.get(cell.mask)
            if cell.ranks == most and (known is None or value > (known.record.value or 0.0)):
                best[cell.mask] = cell
        if most < 2 or not best:
            continue
        shown = [
            f"{mask} {_scale(cell).with_unit(cell.record.value)} "
            f"({variant_of('scaling', cell, True)})"
            for mask, cell in list(best.items())[:5]
        ]
        how = "simulated" if simulated else "measured"
        head = element("b", "Scaling: ")
        lines.append(joined(head, f"best of {most:,} ranks, {how}: {', '.join(shown)}."))
    return lines


def _scale(cell: Cell) -> units.Scale:
    return units.scale_of([cell.record.value], cell.record.unit)


def _errors(cells: Sequence[Cell]) -> list[object]:
    """The largest error of each dtype."""
    worst: dict[str, tuple[float, str]] = {}
    for cell in cells:
        found = cell.worst_error if cell.ok else None
        if found is not None:
            dtype = cell.text("dtype") or "unnamed dtype"
            worst[dtype] = max(worst.get(dtype, (0.0, "")), (found[1], found[0]))
    if not worst:
        return []
    text = "; ".join(f"{units.number(v)} in {d} ({n})" for d, (v, n) in sorted(worst.items()))
    return [joined(element("b", "Errors: "), f"largest relative error against float64: {text}.")]

"""Cells that measure the same thing under the same conditions, as one point each."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ringattn.benchmarks.report import units
from ringattn.benchmarks.report.cells import OWN, Cell

BASELINES = ("one_process", "sdpa", "one_process_sdpa", "single")  # contenders without ranks


@dataclass(frozen=True)
class Point:
    """All cells of one (mask, variant, layout, ranks, direction): packs of sampled masks.

    Attributes:
        variant: the kernel, method or contender that is compared with others.
        cells: at least one.
    """

    mask: str
    variant: str
    layout: str
    ranks: int
    direction: str
    cells: tuple[Cell, ...]

    @cached_property
    def measured(self) -> tuple[Cell, ...]:
        """The cells with a figure."""
        return tuple(cell for cell in self.cells if cell.ok)

    @property
    def status(self) -> str:
        """ok where there is a figure; else error before refused."""
        found = {cell.record.status for cell in self.cells}
        return next(status for status in ("ok", "error", "refused") if status in found)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why cells have no figure, each reason once."""
        return tuple(dict.fromkeys(c.record.reason for c in self.cells if not c.ok))

    @cached_property
    def value(self) -> float | None:
        """The headline figure: the median of the packs'."""
        return median(cell.record.value for cell in self.measured)

    @cached_property
    def spread(self) -> float | None:
        """Half the interquartile range: of the packs, or of the one run's repetitions."""
        values = sorted(c.record.value for c in self.measured if c.record.value is not None)
        if len(values) < 4:
            return median(cell.record.spread for cell in self.measured)
        quarters = statistics.quantiles(values, n=4, method="inclusive")
        return (quarters[2] - quarters[0]) / 2

    def figure(self, name: str) -> float | None:
        """The median of a further figure."""
        return median(cell.figures.get(name) for cell in self.measured)

    @property
    def error(self) -> tuple[str, float] | None:
        """The largest relative error and whose it is."""
        found = [cell.worst_error for cell in self.measured]
        return max((e for e in found if e), key=lambda pair: pair[1], default=None)


@dataclass(frozen=True)
class Group:
    """The points of one setting, which may stand in one picture.

    Attributes:
        title: the setting in words.
        simulated: whether the figures are predictions.
        unit: of the points' values.
    """

    title: str
    simulated: bool
    unit: str
    points: tuple[Point, ...]

    @property
    def masks(self) -> list[str]:
        return _seen(point.mask for point in self.points)

    @property
    def variants(self) -> list[str]:
        """Variants, our own first and those without ranks last."""
        found = _seen(point.variant for point in self.points)
        return sorted(
            found, key=lambda name: (name in BASELINES, name != "auto", not name.startswith(OWN))
        )

    @property
    def ranks(self) -> list[int]:
        return sorted({point.ranks for point in self.points})

    @property
    def directions(self) -> list[str]:
        found = {point.direction for point in self.points}
        order = [d for d in ("both", "forward", "backward") if d in found]
        return order + sorted(found - set(order))

    @cached_property
    def _best(self) -> Mapping[tuple[str, str, int, str], Point]:
        best: dict[tuple[str, str, int, str], Point] = {}
        for point in self.points:
            key = (point.mask, point.variant, point.ranks, point.direction)
            if key not in best or self.better(point, best[key]):
                best[key] = point
        return best

    def best(self, mask: str, variant: str, ranks: int, direction: str) -> Point | None:
        """The point of the best layout; None where nothing was run."""
        return self._best.get((mask, variant, ranks, direction))

    def better(self, one: Point, other: Point) -> bool:
        """Whether a point beats another of this group; any figure beats none."""
        if one.value is None or other.value is None:
            return other.value is None and one.value is not None
        less = units.less_is_better(self.unit)
        return one.value < other.value if less else one.value > other.value

    def fastest(self, points: Iterable[Point]) -> Point | None:
        """The best of some points; None where none has a figure."""
        best: Point | None = None
        for point in points:
            if point.value is not None and (best is None or self.better(point, best)):
                best = point
        return best

    def baseline(self, point: Point) -> Point | None:
        """The one process that a point is compared with; None where it was not run.

        A contender without ranks where there is one, else our own best on one rank.
        """
        for ranks in (point.ranks, 1):
            for variant in BASELINES:
                found = self.best(point.mask, variant, ranks, point.direction)
                if found is not None and found.value:
                    return found
        found = self._alone.get((point.mask, point.direction)) if self.ranks[-1] > 1 else None
        return found if found is not None and found.value else None

    @cached_property
    def _alone(self) -> Mapping[tuple[str, str], Point]:
        alone: dict[tuple[str, str], Point] = {}
        for (mask, _, ranks, direction), point in self._best.items():
            key = (mask, direction)
            own = ranks == 1 and point.cells[0].contender == OWN
            if own and (key not in alone or self.better(point, alone[key])):
                alone[key] = point
        return alone

    def ratio(self, point: Point) -> float | None:
        """Speed per rank over that of one process; None without either."""
        base = self.baseline(point)
        if base is None or not base.value or not point.value:
            return None
        less = units.less_is_better(self.unit)
        return base.value / point.value if less else point.value / base.value


def groups_of(suite: str, cells: Sequence[Cell]) -> list[Group]:
    """The cells by setting, most cells first among measured ones, simulated ones last."""
    found: dict[tuple[str, bool, str], list[Cell]] = {}
    for cell in cells:
        key = (setting(cell), cell.simulated, cell.record.unit)
        found.setdefault(key, []).append(cell)
    ordered = sorted(found.items(), key=lambda item: (item[0][1], -len(item[1])))
    return [Group(*key, _points(suite, part)) for key, part in ordered]


def setting(cell: Cell) -> str:
    """What must be alike for figures to be comparable, in words."""
    heads, dim = cell.config.get("heads"), cell.config.get("head_dim")
    if isinstance(heads, list | tuple):
        heads = ":".join(str(count) for count in heads)
    dim = "/".join(str(size) for size in dim) if isinstance(dim, list | tuple) else dim
    parts = [
        f"{units.tokens(cell.whole('seq_len'))} tokens" if cell.whole("seq_len") else "",
        f"heads {heads} × {dim}" if heads and dim else "",
        cell.text("dtype"),
        f"batch {cell.text('batch')}" if cell.whole("batch") > 1 else "",
        f"{cell.text('lengths')} documents" if cell.text("lengths") else "",
        _model(cell.config.get("model")),
        cell.text("quantity"),
        cell.device,
    ]
    return " · ".join(part for part in parts if part)


def _model(value: object) -> str:
    """A model by name, or its sizes in a row."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {size}" for key, size in value.items())
    return str(value or "")


def _points(suite: str, cells: Sequence[Cell]) -> tuple[Point, ...]:
    several = len({c.text("method") for c in cells if c.contender == OWN}) > 1
    found: dict[tuple[str, str, int, str], list[Cell]] = {}
    for cell in cells:
        key = (cell.mask, variant_of(suite, cell, several), cell.ranks, cell.direction)
        found.setdefault(key, []).append(cell)
    points = []
    for (mask, variant, ranks, direction), part in found.items():
        for layout, same in _by_layout(part):
            points.append(Point(mask, variant, layout, ranks, direction, tuple(same)))
    return tuple(points)


def _by_layout(cells: Sequence[Cell]) -> Iterable[tuple[str, Sequence[Cell]]]:
    """Cells by layout where one pack ran on several; else all, with the layouts that were chosen.

    A layout that the planner chooses may differ from pack to pack, and their median is of all.
    """
    layouts: dict[str, list[Cell]] = {}
    for cell in cells:
        layouts.setdefault(cell.text("layout"), []).append(cell)
    packs = [cell.text("pack") for cell in cells]
    if len(layouts) == 1 or len(set(packs)) == len(packs):
        return [(" / ".join(name for name in layouts if name), cells)]
    return layouts.items()


def variant_of(suite: str, cell: Cell, several: bool) -> str:
    """The name under which a cell is compared with others of its suite.

    Args:
        suite: which decides what is compared.
        cell: the cell.
        several: whether our own system ran with several methods.
    """
    other = cell.contender if cell.contender != OWN else ""
    if suite == "kernels":
        return other or cell.text("kernel") or OWN
    if suite in ("methods", "scaling", "simulated"):
        return other or cell.text("method") or OWN
    method = cell.text("method")
    own_method = suite == "masks" and several and method not in ("", "auto")
    return other or (f"{OWN} {method}" if own_method else OWN)


def median(values: Iterable[float | None]) -> float | None:
    """The median of those that are numbers; None without any."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _seen(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))

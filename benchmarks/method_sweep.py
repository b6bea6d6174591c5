"""An exhaustive offline sweep of layout, head-parallel degree, inner method and stages.

What the planner does not have the time for: every layout in several chunk sizes and groups, under
every method, degree and number of stages. `ringattn.benchmarks.method_table --sweep` prices it for
each mask and writes how far "auto" is from its best.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringattn import layouts, methods
from ringattn.cost import Cluster, price_pair
from ringattn.errors import UserError
from ringattn.masks import Mask
from ringattn.methods.common import Problem
from ringattn.schedule import Shapes

Options = tuple[tuple[str, int], ...]
STAGES = (1, 2, 4)
CHUNKS = (2048, 4096)
TILES = 150_000  # more tiles than this are not planned: no launch list should be that long
SWEPT_TILES = 60_000  # nor swept, where every method would be planned on them


@dataclass(frozen=True)
class Entry:
    """A way to run a mask: layout and method with their options, and the kernel of the price."""

    layout: str
    method: str
    options: Options = ()
    layout_options: Options = ()
    kernel: str | None = None

    @property
    def name(self) -> str:
        """The method with its options."""
        return self.method + "".join(f",{key}={value}" for key, value in self.options)

    @property
    def place(self) -> str:
        """The layout with its options."""
        return self.layout + "".join(f",{key}={value}" for key, value in self.layout_options)


def sweep_entries(shapes: Shapes, ranks: int, node: int) -> Iterator[Entry]:
    """Every combination, in an order that takes layouts together."""
    degrees = [u for u in range(2, min(node, shapes.kv_heads) + 1) if node % u == 0]
    for layout, options in _layouts(degrees, node):
        for method in methods.METHODS:
            for settings in _settings(method, degrees, shapes, ranks):
                yield Entry(layout, method, settings, options)


def _layouts(degrees: Sequence[int], node: int) -> Iterator[tuple[str, Options]]:
    for name in layouts.NAMES:
        yield name, ()
        if "chunk" in layouts.OPTIONS.get(name, ()):
            for chunk in CHUNKS:
                yield name, (("chunk", chunk),)
        if "group" in layouts.OPTIONS.get(name, ()):
            for group in degrees:
                if group < node:
                    yield name, (("group", group),)


def _settings(method: str, degrees: Sequence[int], shapes: Shapes, ranks: int) -> Iterator[Options]:
    if method == "direct":
        yield ()
        for stages in STAGES:
            yield (("stages", stages),)
        yield (("stages", 1), ("join", 1))
    elif method == "hybrid":
        for u in degrees:
            for stages in STAGES:
                yield (("u", u), ("stages", stages))
    elif method in ("usp", "loongtrain"):
        for u in degrees:
            yield (("u", u),)
    elif method != "ulysses" or shapes.q_heads >= ranks:
        yield ()


def sweep(
    mask: Mask, shapes: Shapes, ranks: int, cluster: Cluster, node: int | None = None
) -> list[tuple[float, Entry]]:
    """(seconds forward and backward, entry) of every entry that can be planned, fastest first."""
    node = node or min(cluster.ranks_per_node, ranks)
    found: list[tuple[float, Entry]] = []
    posed: tuple[str, Problem | None] = ("", None)
    for entry in sweep_entries(shapes, ranks, node):
        if entry.place != posed[0]:
            posed = entry.place, pose(entry, mask, shapes, ranks, node, SWEPT_TILES)
        if posed[1] is None:
            continue
        try:
            found.append((_seconds(entry, posed[1], cluster), entry))
        except UserError:  # not every method has a plan on every layout
            continue
    return sorted(found, key=lambda pair: pair[0])


def pose(
    entry: Entry, mask: Mask, shapes: Shapes, ranks: int, node: int, tiles: int = TILES
) -> Problem | None:
    """The problem on an entry's layout; None where there is none, or one of too many tiles."""
    try:
        layout = layouts.by_name(entry.layout, mask, ranks, node, **dict(entry.layout_options))
    except UserError:
        return None
    problem = Problem(mask=mask, layout=layout, shapes=shapes, ranks_per_node=node)
    # Stripes of one token see every document from every pair of ranks.
    pairs = ranks**2 if entry.layout == "striped" else ranks
    if pairs * len(mask.bands) > tiles:
        return None
    try:
        return problem if len(problem.pieces) <= tiles else None
    except UserError:  # too many tiles, or too many blocks for each
        return None


def _seconds(entry: Entry, problem: Problem, cluster: Cluster) -> float:
    posed = problem.with_options(dict(entry.options))
    method = methods.by_name(entry.method)
    schedules = method.forward(posed), method.backward(posed)
    return sum(p.seconds for p in price_pair(schedules, cluster, entry.kernel))

"""Hybrid: what stays inside one rank moves nothing; the rest is shared by heads and gathered.

Tokens are private where every pair they take part in lies on their own rank (short documents that
the layout kept whole), and where that does not leave their rank with more work than the others of
its node. Private tokens are computed at home with all heads. The others are pooled by
the ranks of a node, each of which takes a slice of the heads, and whole nodes exchange exactly the
key rows they need (direct), half of the heads ahead of the others. Bytes received per rank: the formulas of `ringattn.methods.heads` and
`ringattn.methods.direct`, counted over the rows that are not private.
The option "u" is the head-parallel degree (default as for usp). Made for the layout "hybrid".
"""

import numpy as np

from ringattn.methods import direct
from ringattn.methods.common import Problem, finish, moves_of, tasks_of
from ringattn.methods.heads import check_degree, compose
from ringattn.methods.usp import default_degree
from ringattn.schedule import Direction, Schedule
from ringattn.tiles import intersect


_SLACK = 0.01  # share of a rank's work by which private work may differ


def split_ranges(problem: Problem, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """The layout's ranges cut at the mask's edges, and which of them are private."""
    ranges, bands = problem.layout.ranges, problem.mask.bands
    if not len(ranges) or ranges["step"][0] > 1:
        return ranges, np.zeros(len(ranges), dtype=bool)
    edges = np.unique(np.concatenate([bands["q0"], bands["q1"], bands["k0"], bands["k1"]]))
    first = np.searchsorted(edges, ranges["start"], side="right")
    last = np.searchsorted(edges, ranges["stop"], side="left")
    count = last - first + 1
    parts = np.repeat(ranges, count)
    number = np.arange(len(parts)) - np.repeat(np.cumsum(count) - count, count)
    edge = np.repeat(first, count) + number
    begin, end = parts["start"].copy(), parts["stop"].copy()
    inside, before = number > 0, edge < np.repeat(last, count)
    parts["start"][inside] = edges[edge[inside] - 1]
    parts["stop"][before] = edges[edge[before]]
    parts["offset"] += parts["start"] - begin
    assert (parts["stop"] <= end).all()
    pieces = intersect(bands, parts, parts)
    crossing = parts["owner"][pieces["qseg"]] != parts["owner"][pieces["kseg"]]
    shared = np.zeros(len(parts), dtype=bool)
    shared[pieces["qseg"][crossing]] = shared[pieces["kseg"][crossing]] = True
    shared = _reached(shared, pieces)
    area = np.bincount(pieces["qseg"], weights=pieces["area"], minlength=len(parts))
    uneven = _uneven(parts["owner"], area, ~shared, problem.world, degree)
    return parts, ~(_reached(shared | uneven, pieces) if uneven.any() else shared)


def _uneven(
    owner: np.ndarray, area: np.ndarray, private: np.ndarray, world: int, degree: int
) -> np.ndarray:
    """Private parts that leave their rank with more work than the mean of its head group.

    Of a rank with too much, the smallest part that is enough, or the largest ones.
    """
    load = np.bincount(owner[private], weights=area[private], minlength=world)
    mean = load.reshape(-1, degree).mean(axis=1).repeat(degree)
    excess = load - mean - _SLACK * area.sum() / world
    chosen = np.zeros(len(owner), dtype=bool)
    for rank in np.flatnonzero(excess > 0).tolist():
        mine = np.flatnonzero(private & (owner == rank))
        mine = mine[np.argsort(-area[mine], kind="stable")]
        over = float(excess[rank])
        for index, part in enumerate(mine.tolist()):
            following = area[mine[index + 1]] if index + 1 < len(mine) else 0.0
            if over > 0 and following < over:
                chosen[part] = True
                over -= float(area[part])
    return chosen


def _reached(shared: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Shared parts, and all that share a pair with them, to the end."""
    shared = shared.copy()
    while True:
        touched = shared[pieces["qseg"]] | shared[pieces["kseg"]]
        before = int(shared.sum())
        shared[pieces["qseg"][touched]] = shared[pieces["kseg"][touched]] = True
        if int(shared.sum()) == before:
            return shared


def _split(problem: Problem, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cut ranges, which are private, and the tasks of those."""
    parts, private = split_ranges(problem, degree)
    alone = parts[private]
    pieces = intersect(problem.mask.bands, alone, alone)
    return parts, private, tasks_of(problem, pieces, alone["owner"][pieces["qseg"]])


def _plan(problem: Problem, direction: Direction) -> Schedule:
    degree = problem.options.get("u", 0) or default_degree(problem)
    check_degree(problem, degree)
    parts, private, tasks = problem.once(f"hybrid {degree}", lambda: _split(problem, degree))
    if private.all():
        empty = moves_of(problem, 0)
        return finish(problem, direction, "hybrid", tasks.copy(), empty)
    inner = direct.forward if direction == "forward" else direct.backward
    split = problem.shapes.q_heads // degree > 1
    posed = problem.with_options(problem.options | {"by_heads": int(split)})
    return compose(
        posed, direction, "hybrid", inner, degree, ranges=parts[~private], private=tasks,
        overlap=split,
    )  # fmt: skip


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "forward")


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "backward")

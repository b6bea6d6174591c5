"""Hybrid: what stays inside one rank moves nothing; the rest is shared by heads and gathered.

Source: this project; the exchange of heads is that of DeepSpeed-Ulysses (arXiv 2309.14509), that of
keys MagiAttention's. Bytes received per rank: with m of its n rows not private, those of
`ringattn.methods.ulysses` for U and m in place of n; and 2 D Hkv / U times e (forward) or e + g
(backward) for each remote row that its slice of the heads attends.

Tokens are private where every pair they take part in lies on their own rank (short documents that
the layout kept whole), and where that does not leave their rank with more work than the others of
its node. Private tokens are computed at home with all heads. The others are pooled by the ranks of
a node, each of which takes a slice of the heads, and whole nodes exchange exactly the key rows they
need (direct), half of the heads ahead of the others.
The option "u" is the head-parallel degree (default as for usp); "slack" is how many per cent of a
rank's work its private work may exceed the mean by (default 10). Made for the layout "hybrid".
"""

from bisect import bisect_left
from itertools import pairwise

import numpy as np

from ringattn.block_tiles import see
from ringattn.methods import direct
from ringattn.methods.common import Problem, finish, moves_of, tasks_of
from ringattn.methods.heads import check_degree, compose
from ringattn.methods.usp import default_degree
from ringattn.schedule import Direction, Schedule

SLACK = 10  # percent of a rank's work by which its private work may exceed the mean
_ENOUGH = 0.7  # share of the excess that a part should hold


def split_ranges(problem: Problem, degree: int, slack: int) -> tuple[np.ndarray, np.ndarray]:
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
    pieces = see(problem.mask, parts, parts)
    crossing = parts["owner"][pieces["qseg"]] != parts["owner"][pieces["kseg"]]
    shared = np.zeros(len(parts), dtype=bool)
    shared[pieces["qseg"][crossing]] = shared[pieces["kseg"][crossing]] = True
    shared = _reached(shared, pieces)
    area = np.bincount(pieces["qseg"], weights=pieces["area"], minlength=len(parts))
    most = slack / 100 * float(area.sum()) / problem.world
    uneven = _uneven(parts["owner"], area, ~shared, problem.world, degree, most)
    return parts, ~(_reached(shared | uneven, pieces) if uneven.any() else shared)


def _uneven(
    owner: np.ndarray, area: np.ndarray, private: np.ndarray, world: int, degree: int, slack: float
) -> np.ndarray:
    """Private parts to share so that no rank keeps more than `slack` above its head group's mean.

    Of the rank with most, the smallest part that brings it near the mean, or its largest.
    """
    load = np.bincount(owner[private], weights=area[private], minlength=world)
    chosen = np.zeros(len(owner), dtype=bool)
    mine = np.flatnonzero(private & (area > 0))
    mine = mine[np.lexsort((area[mine], owner[mine]))]  # of each rank, the smallest first
    bounds = np.searchsorted(owner[mine], np.arange(world + 1))
    held = [mine[a:b].tolist() for a, b in pairwise(bounds.tolist())]
    sizes = area.tolist()
    for first in range(0, world, degree):
        loads = load[first : first + degree].tolist()
        while (excess := max(loads) - sum(loads) / degree) > slack:
            rank = loads.index(max(loads))
            parts = held[first + rank]
            place = bisect_left(parts, _ENOUGH * excess, key=sizes.__getitem__)
            part = parts.pop(min(place, len(parts) - 1))
            loads[rank] -= sizes[part]
            chosen[part] = True
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


def _split(problem: Problem, degree: int, slack: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cut ranges, which are private, and the tasks of those."""
    parts, private = split_ranges(problem, degree, slack)
    alone = parts[private]
    pieces = see(problem.mask, alone, alone)
    return parts, private, tasks_of(problem, pieces, alone["owner"][pieces["qseg"]])


def _plan(problem: Problem, direction: Direction) -> Schedule:
    degree = problem.options.get("u", 0) or default_degree(problem)
    check_degree(problem, degree)
    slack = problem.options.get("slack", SLACK)
    name = f"hybrid {degree} {slack}"
    parts, private, tasks = problem.once(name, lambda: _split(problem, degree, slack))
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

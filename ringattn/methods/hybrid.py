"""Hybrid: what stays inside one rank moves nothing; the rest is shared by heads and gathered.

Tokens are private where every pair they take part in lies on their own rank (short documents that
the layout kept whole). Private tokens are computed at home with all heads. The others are pooled by
the ranks of a node, each of which takes a slice of the heads, and whole nodes exchange exactly the
key rows they need (direct). Bytes received per rank: the formulas of `ringattn.methods.heads` and
`ringattn.methods.direct`, counted over the rows that are not private.
The option "u" is the head-parallel degree (default as for usp). Made for the layout "hybrid".
"""

import numpy as np

from ringattn.blocks import see
from ringattn.layout import Layout
from ringattn.methods import direct
from ringattn.methods.common import Problem, finish, moves_of, tasks_of
from ringattn.methods.heads import compose
from ringattn.methods.usp import default_degree
from ringattn.schedule import Direction, Schedule


def split_ranges(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
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
    return parts, ~_reached(len(parts), pieces, crossing)


def _reached(count: int, pieces: np.ndarray, crossing: np.ndarray) -> np.ndarray:
    """Parts with a crossing pair, and all that share a pair with them, to the end."""
    shared = np.zeros(count, dtype=bool)
    shared[pieces["qseg"][crossing]] = shared[pieces["kseg"][crossing]] = True
    while True:
        touched = shared[pieces["qseg"]] | shared[pieces["kseg"]]
        before = int(shared.sum())
        shared[pieces["qseg"][touched]] = shared[pieces["kseg"][touched]] = True
        if int(shared.sum()) == before:
            return shared


def _plan(problem: Problem, direction: Direction) -> Schedule:
    parts, private = split_ranges(problem)
    alone = Layout(problem.mask.seq_len, problem.world, "private", parts[private])
    pieces = see(problem.mask, alone.ranges, alone.ranges)
    tasks = tasks_of(problem, pieces, alone.ranges["owner"][pieces["qseg"]])
    if private.all():
        empty = moves_of(problem, 0)
        return finish(problem, direction, "hybrid", tasks, empty)
    degree = problem.options.get("u", 0) or default_degree(problem)
    inner = direct.forward if direction == "forward" else direct.backward
    return compose(
        problem, direction, "hybrid", inner, degree, ranges=parts[~private], private=tasks
    )


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "forward")


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "backward")

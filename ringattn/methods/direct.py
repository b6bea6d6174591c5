"""Direct: every rank receives exactly the key rows that its queries attend, from their owners.

Source: zero-redundant group-cast and group-reduce of MagiAttention, here as point-to-point moves in
stages. Bytes received per rank: forward 2 D Hkv e times the needed remote rows; backward times
(e + g) / e. For a causal window of W keys on contiguous shards: 2 min(W-1, r n) Hkv D e forward.
The option "stages" fixes the number of stages; by default each holds about one shard. "join" 1
joins the home and remote keys of a query, where there is one stage, and "by_heads" 1 cuts local
work by heads (see `ringattn.methods.gather`).
"""

import numpy as np

from ringattn.block_tiles import key_runs
from ringattn.methods.common import Problem
from ringattn.methods.gather import Runs, gather, union_of_rows
from ringattn.schedule import Direction, Schedule


def _needed(problem: Problem) -> Runs:
    """The union of the rows that each rank's remote tiles touch."""
    ranges, remote = problem.layout.ranges, problem.q_rank != problem.k_rank
    index, first, last = key_runs(problem.mask, problem.pieces[remote])
    where = problem.q_rank[remote][index] * len(ranges) + problem.pieces["kseg"][remote][index]
    where, first, last = union_of_rows(where, first, last)
    receiver, segment = np.divmod(where, max(len(ranges), 1))
    start = ranges["start"][segment] + (first - ranges["offset"][segment]) * ranges["step"][segment]
    order = np.lexsort((start, receiver))
    return Runs(receiver[order], segment[order], first[order], last[order])


def _plan(problem: Problem, direction: Direction) -> Schedule:
    stages, join = problem.options.get("stages", 0), bool(problem.options.get("join", 0))
    by_heads = bool(problem.options.get("by_heads", 0))
    return gather(
        problem, direction, "direct", lambda: _needed(problem), stages, join=join, by_heads=by_heads
    )


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "forward")


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "backward")

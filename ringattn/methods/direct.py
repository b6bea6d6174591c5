"""Direct: every rank receives exactly the key rows that its queries attend, from their owners.

Source: zero-redundant group-cast and group-reduce of MagiAttention, here as point-to-point moves in
stages. Bytes received per rank: forward 2 D Hkv e times the needed remote rows; backward times
(e + g) / e. For a causal window of W keys on contiguous shards: 2 min(W-1, r n) Hkv D e forward.
The option "stages" fixes the number of stages; by default each holds about one shard.
"""

import numpy as np

from ringattn.blocks import key_runs
from ringattn.methods.common import Problem
from ringattn.methods.gather import Runs, gather
from ringattn.schedule import Schedule

_ROW = 1 << 41  # more than any row number, so that (run, row) orders as one integer


def _needed(problem: Problem) -> Runs:
    """The union of the rows that each rank's remote tiles touch."""
    ranges, remote = problem.layout.ranges, problem.q_rank != problem.k_rank
    index, first, last = key_runs(problem.mask, problem.pieces[remote])
    receiver, segment = problem.q_rank[remote][index], problem.pieces["kseg"][remote][index]
    where = (receiver * len(ranges) + segment) * _ROW
    order = np.argsort(where + first, kind="stable")
    low = (where + first)[order]
    reach = np.maximum.accumulate((where + last)[order]) if len(order) else low
    opens = np.flatnonzero(np.concatenate([[True], low[1:] > reach[:-1]])) if len(low) else low
    closes = np.concatenate([opens[1:] - 1, [len(low) - 1]]) if len(low) else opens
    receiver, segment = receiver[order][opens], segment[order][opens]
    first, last = low[opens] % _ROW, reach[closes] % _ROW
    start = ranges["start"][segment] + (first - ranges["offset"][segment]) * ranges["step"][segment]
    order = np.lexsort((start, receiver))
    return Runs(receiver[order], segment[order], first[order], last[order])


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    stages = problem.options.get("stages", 0)
    return gather(problem, "forward", "direct", _needed(problem), stages)


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    stages = problem.options.get("stages", 0)
    return gather(problem, "backward", "direct", _needed(problem), stages)

"""Direct: every rank receives exactly the key rows that its queries attend, from their owners.

Source: zero-redundant group-cast and group-reduce of MagiAttention, here as point-to-point moves in
stages. Bytes received per rank: forward 2 D Hkv e times the needed remote rows; backward times
(e + g) / e. For a causal window of W keys on contiguous shards: 2 min(W-1, r n) Hkv D e forward.

A receiver's rows are sorted by global position and cut into near-equal stages of about one shard;
rank r takes stage r - 1 first and walks downwards, so that on dense masks every rank sends to one
receiver at a time, as a ring does. Stage j fills one of two buffers while stage j - 1 computes. In
the backward each stage's dK, dV return to their owners during the next stage.
"""

from dataclasses import dataclass

import numpy as np

from ringattn.bands import expand_ranges
from ringattn.methods.common import Problem, finish, halve, moves_of, tasks_of
from ringattn.schedule import Channel, Op, Schedule, Wire
from ringattn.tiles import SEGMENT, intersect

_ROW = 1 << 41


@dataclass(frozen=True)
class _Rows:
    """Runs of needed rows, cut at stages: columns of equal length.

    receiver, owner: ranks. segment: the owner's range. s0, rows: rows of the owner's shard.
    stage: step in which they travel. d0: their first row in the receiver's stage buffer.
    """

    receiver: np.ndarray
    owner: np.ndarray
    segment: np.ndarray
    s0: np.ndarray
    rows: np.ndarray
    stage: np.ndarray
    d0: np.ndarray


def _needed(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint runs (receiver, segment, first row, last row + 1) in order of global position."""
    pieces, ranges = problem.pieces, problem.layout.ranges
    remote = problem.q_rank != problem.k_rank
    receiver, segment = problem.q_rank[remote], pieces["kseg"][remote]
    first, last = pieces["k0"][remote], pieces["k1"][remote]
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
    return receiver[order], segment[order], first[order], last[order]


def _staged(problem: Problem) -> _Rows:
    receiver, segment, first, last = _needed(problem)
    rows = last - first
    total = np.bincount(receiver, weights=rows, minlength=problem.world).astype(np.int64)
    end = np.cumsum(rows)
    begin = end - rows - (np.cumsum(total) - total)[receiver]
    stages, size = _stage_sizes(problem, total)
    size_here = size[receiver]
    which, part = expand_ranges(begin // size_here, (begin + rows - 1) // size_here + 1)
    low = np.maximum(begin[which], part * size_here[which])
    high = np.minimum((begin + rows)[which], (part + 1) * size_here[which])
    receiver = receiver[which]
    return _Rows(
        receiver=receiver,
        owner=problem.layout.ranges["owner"][segment[which]],
        segment=segment[which],
        s0=first[which] + low - begin[which],
        rows=high - low,
        stage=(receiver - 1 - part) % np.maximum(stages[receiver], 1),
        d0=low - part * size[receiver],
    )


def _stage_sizes(problem: Problem, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of stages of each receiver and rows of a stage; about one shard unless asked."""
    target = max(int(problem.layout.sizes.max(initial=1)), 1)
    asked = problem.options.get("stages", 0)
    stages = np.full_like(total, asked) if asked else -(-total // target)
    size = -(-total // np.maximum(stages, 1))
    # Kernels like tiles cut at multiples of 128.
    size = np.where(size >= 1024, -(-size // 128) * 128, np.maximum(size, 1))
    return -(-total // size), size


def _buffer_segments(problem: Problem, rows: _Rows) -> np.ndarray:
    """Stage buffers as segments; rows that follow each other in both orders become one."""
    ranges = problem.layout.ranges[rows.segment]
    table = np.zeros(len(rows.rows), dtype=SEGMENT)
    table["step"] = ranges["step"]
    table["start"] = ranges["start"] + (rows.s0 - ranges["offset"]) * ranges["step"]
    table["stop"] = table["start"] + rows.rows * ranges["step"]
    table["group"], table["owner"], table["offset"] = rows.receiver, rows.stage, rows.d0
    table = table[np.lexsort((rows.d0, rows.stage, rows.receiver))]
    if len(table) < 2:
        return table
    a, b = table[:-1], table[1:]
    breaks = (a["group"] != b["group"]) | (a["owner"] != b["owner"]) | (a["stop"] != b["start"])
    opens = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    joined = table[opens]
    joined["stop"] = table["stop"][np.concatenate([opens[1:] - 1, [len(table) - 1]])]
    return joined


def _slot(stage: np.ndarray) -> np.ndarray:
    """Two buffers in turn."""
    return 1 + stage % 2


def _remote_tasks(problem: Problem, rows: _Rows) -> np.ndarray:
    buffers = _buffer_segments(problem, rows)
    queries = problem.layout.ranges.copy()
    queries["group"] = queries["owner"]
    pieces = intersect(problem.mask.bands, queries, buffers)
    stage = buffers["owner"][pieces["kseg"]]
    rank = queries["owner"][pieces["qseg"]]
    return tasks_of(problem, pieces, rank, stage + 1, _slot(stage), _slot(stage))


def _kv_moves(problem: Problem, rows: _Rows) -> np.ndarray:
    return moves_of(
        problem,
        len(rows.rows),
        post=rows.stage,
        src=rows.owner,
        dst=rows.receiver,
        channel=Channel.K,
        dslot=_slot(rows.stage),
        s0=rows.s0,
        d0=rows.d0,
        rows=rows.rows,
        op=Op.SET,
        dtype=Wire.INPUT,
    )


def _local_tasks(problem: Problem) -> np.ndarray:
    local = problem.q_rank == problem.k_rank
    return tasks_of(problem, problem.pieces[local], problem.q_rank[local])


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    rows = _staged(problem)
    tasks = np.concatenate([_local_tasks(problem), _remote_tasks(problem, rows)])
    return finish(problem, "forward", "direct", tasks, _kv_moves(problem, rows))


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    rows = _staged(problem)
    returns = moves_of(
        problem,
        len(rows.rows),
        post=rows.stage + 2,
        src=rows.receiver,
        dst=rows.owner,
        channel=Channel.DKV,
        sslot=_slot(rows.stage),
        s0=rows.d0,
        d0=rows.s0,
        rows=rows.rows,
        op=Op.ADD,
        take=1,
        dtype=problem.wire,
    )
    local = _local_tasks(problem)
    if len(returns):
        local = halve(local, int(returns["land"].max()))
    tasks = np.concatenate([local, _remote_tasks(problem, rows)])
    return finish(
        problem, "backward", "direct", tasks, np.concatenate([_kv_moves(problem, rows), returns])
    )

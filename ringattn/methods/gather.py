"""Gathering: every rank receives runs of key rows from their owners, in stages, and returns dK, dV.

What direct and all-gather share; they differ in which rows travel. A receiver's rows are sorted by
global position and cut into near-equal stages; rank r takes stage r - 1 first and walks downwards,
so that on dense masks every rank sends to one receiver at a time, as a ring does. Stage j fills one
of two buffers while stage j - 1 computes; in the backward its dK, dV return to their owners during
the next stage, and half of the local work waits for the last returns.

A forward may be joined where all rows travel in one stage: queries with remote keys then find
their home keys, copied, in the same buffer, in global order, so that one launch computes them and
no result is merged. It pays where few queries have remote keys, as under a window. Not in the
backward, where a kernel pays for every key of a tile, and home keys would be in two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ringattn.bands import expand_ranges
from ringattn.block_tiles import key_runs, see
from ringattn.layout import join
from ringattn.methods.common import Problem, finish, halve, moves_of, tasks_of
from ringattn.schedule import Channel, Direction, Op, Schedule, Wire
from ringattn.tiles import SEGMENT

_ROW = 1 << 41  # more than any row number, so that (run, row) orders as one integer


@dataclass(frozen=True)
class Runs:
    """Disjoint runs of rows that ranks receive, ordered by receiver and global position.

    receiver: rank. segment: index of the owner's range. first, last: rows of the owner's shard.
    """

    receiver: np.ndarray
    segment: np.ndarray
    first: np.ndarray
    last: np.ndarray


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


def _staged(problem: Problem, runs: Runs, stages_asked: int) -> _Rows:
    receiver, segment, first = runs.receiver, runs.segment, runs.first
    rows = runs.last - first
    total = np.bincount(receiver, weights=rows, minlength=problem.world).astype(np.int64)
    end = np.cumsum(rows)
    begin = end - rows - (np.cumsum(total) - total)[receiver]
    stages, size = _stage_sizes(problem, total, stages_asked)
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


def _stage_sizes(problem: Problem, total: np.ndarray, asked: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of stages of each receiver and rows of a stage; about one shard unless asked."""
    target = max(int(problem.layout.sizes.max(initial=1)), 1)
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
    # One key sorts faster than three; no buffer has more than _ROW rows.
    where = rows.receiver * (int(rows.stage.max(initial=0)) + 1) + rows.stage
    return join(table[np.argsort(where * _ROW + rows.d0, kind="stable")])


def _slot(stage: np.ndarray) -> np.ndarray:
    """Two buffers in turn."""
    return 1 + stage % 2


def _remote_tasks(problem: Problem, rows: _Rows, queries: np.ndarray) -> np.ndarray:
    """What query segments compute in the stage buffers of their ranks."""
    buffers = _buffer_segments(problem, rows)
    queries = queries.copy()
    queries["group"] = queries["owner"]
    pieces = see(problem.mask, queries, buffers)
    stage = buffers["owner"][pieces["kseg"]]
    rank = queries["owner"][pieces["qseg"]]
    return tasks_of(problem, pieces, rank, stage + 1, kslot=_slot(stage), gslot=_slot(stage))


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


def gather(
    problem: Problem,
    direction: Direction,
    method: str,
    runs: Callable[[], Runs],
    stages: int,
    *,
    join: bool = False,
    by_heads: bool = False,
) -> Schedule:
    """Plans one direction in which ranks receive `runs` in `stages` (0: about a shard each).

    `join` asks for a joined forward; it is one where `stages` is 1 and the layout's step is 1.
    `by_heads` cuts local work by heads, in the forward too, so that half of the heads start late
    and the others are done early. Pure host work; every rank builds the same schedule.
    """
    join &= direction == "forward" and stages == 1
    name = f"gather {method} {stages} {join}"
    rows, local, remote, moves = problem.once(name, lambda: _tables(problem, runs, stages, join))
    if direction == "backward":
        returns = _gradient_moves(problem, rows)
        if len(returns):
            local = halve(local, int(returns["land"].max()), by_heads=by_heads)
        moves = np.concatenate([moves, returns])
    elif by_heads and len(moves):
        local = halve(local, int(moves["land"].max()) + 2, by_heads=True)
    # Finishing writes to the moves.
    moves = moves.copy()
    return finish(problem, direction, method, np.concatenate([local, remote]), moves)


def _tables(
    problem: Problem, runs: Callable[[], Runs], stages: int, join: bool
) -> tuple[_Rows, np.ndarray, np.ndarray, np.ndarray]:
    """Rows that travel, local and remote tasks, and the moves of keys: what both directions do."""
    queries, needed = problem.layout.ranges, runs()
    if join and len(queries) and queries["step"][0] == 1:
        queries, local, needed = _joined(problem, needed)
    else:
        local = _local_tasks(problem)
    rows = _staged(problem, needed, stages)
    return rows, local, _remote_tasks(problem, rows, queries), _kv_moves(problem, rows)


def _joined(problem: Problem, runs: Runs) -> tuple[np.ndarray, np.ndarray, Runs]:
    """Segments of queries with remote keys, tasks of the others, and runs with copied home keys."""
    remote = problem.q_rank != problem.k_rank
    pieces, ranges = problem.pieces[remote], problem.layout.ranges
    segment, first, last = union_of_rows(pieces["qseg"], pieces["q0"], pieces["q1"])
    far = _cut(ranges, segment, first, last)
    # The gaps between those rows, and before and after them, of every range.
    count = ranges["stop"] - ranges["start"]
    every = np.arange(len(ranges))
    begin = np.concatenate([ranges["offset"], last])
    where = np.concatenate([every, segment])
    order = np.lexsort((begin, where))
    end = np.concatenate([first, ranges["offset"] + count])
    close = np.lexsort((end, np.concatenate([segment, every])))
    near = _cut(ranges, where[order], begin[order], end[close])
    home = ranges.copy()
    for table in (near, far, home):
        table["group"] = table["owner"]
    alone, copied = see(problem.mask, near, home), see(problem.mask, far, home)
    index, k_first, k_last = key_runs(problem.mask, copied)
    k_segment, k_first, k_last = union_of_rows(copied["kseg"][index], k_first, k_last)
    owner = ranges["owner"]
    receiver = np.concatenate([runs.receiver, owner[k_segment]])
    segment = np.concatenate([runs.segment, k_segment])
    first = np.concatenate([runs.first, k_first])
    last = np.concatenate([runs.last, k_last])
    start = ranges["start"][segment] + first - ranges["offset"][segment]
    order = np.lexsort((start, receiver))
    runs = Runs(receiver[order], segment[order], first[order], last[order])
    return far, tasks_of(problem, alone, near["owner"][alone["qseg"]]), runs


def _cut(ranges: np.ndarray, which: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Segments of the rows [first, last) of ranges of step 1; empty ones drop out."""
    table = ranges[which]
    table["start"] += first - table["offset"]
    table["stop"] = table["start"] + last - first
    table["offset"] = first
    return table[last > first]


def union_of_rows(
    segment: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint runs (segment, first, last), ordered, that cover the same rows of each segment."""
    if not len(segment):
        return segment, first, last
    above = segment * _ROW
    order = np.argsort(above + first, kind="stable")
    low, reach = (above + first)[order], np.maximum.accumulate((above + last)[order])
    opens = np.flatnonzero(np.concatenate([[True], low[1:] > reach[:-1]]))
    closes = np.concatenate([opens[1:] - 1, [len(low) - 1]])
    return segment[order][opens], low[opens] % _ROW, reach[closes] % _ROW


def _gradient_moves(problem: Problem, rows: _Rows) -> np.ndarray:
    return moves_of(
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

"""Tiles as FlexAttention masks: key intervals of every row, and which blocks are full or partial.

Every row of a tile attends one interval of keys (every `step`-th key of it). The intervals of a row
are numbered from left to right, neighbours joined; `SLOTS` of them make one mask, so that its test
stays short, and rows with more need several masks. Rows and keys that a mask does not use are left
out, because unfilled rows may hold anything and 0 * NaN is NaN. FlexAttention skips blocks without
allowed pairs and tests no pair of a full block (Dong et al., FlexAttention, arXiv 2412.05496).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ringattn.kernels.lattice import LatticeTile, lattice_tiles

SLOTS = 8
BLOCK = 128


@dataclass(frozen=True)
class FlexTables:
    """One mask, for query heads [h0, h1). Rows and keys are counted among the used ones.

    Attributes:
        rows, keys: buffer rows used, increasing.
        start, stop, step: int32 (slots, rows rounded up to blocks): the intervals [start, stop)
            of each row, every step-th key; empty ones have stop 0. step is None where all are 1.
        full, partial: bool (row blocks, key blocks): everything, or something, is allowed.
    """

    h0: int
    h1: int
    rows: np.ndarray
    keys: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    step: np.ndarray | None
    full: np.ndarray
    partial: np.ndarray


@dataclass(frozen=True)
class _Intervals:
    """Row `row` attends keys range(start, stop, step); arrays, sorted by row and start."""

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    step: np.ndarray

    def at(self, index: np.ndarray) -> "_Intervals":
        return _Intervals(self.row[index], self.start[index], self.stop[index], self.step[index])


def flex_tables(tiles: np.ndarray) -> tuple[FlexTables, ...]:
    """The masks that together are a `TILE` table, each pair in one of them."""
    return tuple(_tables(lattice_tiles(tiles)))


def _tables(tiles: tuple[LatticeTile, ...]) -> Iterator[FlexTables]:
    edges = sorted({h for t in tiles for h in (t.h0, t.h1)})
    for h0, h1 in pairwise(edges):
        mine = [t for t in tiles if t.h0 <= h0 and h1 <= t.h1]
        if not mine:
            continue
        intervals = _join(_sorted_intervals(mine))
        first = np.searchsorted(intervals.row, intervals.row)
        slot = np.arange(len(first)) - first
        for low in range(0, int(slot.max()) + 1, SLOTS):
            here = (slot >= low) & (slot < low + SLOTS)
            yield _table(h0, h1, intervals.at(here), slot[here] - low)


def _sorted_intervals(tiles: list[LatticeTile]) -> _Intervals:
    columns = []
    for t in tiles:
        a = np.arange(t.rows)
        first, last = np.maximum(0, a + t.lo), np.minimum(t.keys - 1, a + t.hi)
        a, first, last = (x[first <= last] for x in (a, first, last))
        start, stop = t.k0 + first * t.step, t.k0 + last * t.step + 1
        columns.append(np.stack([t.q0 + a * t.step, start, stop, np.full_like(a, t.step)]))
    row, start, stop, step = np.concatenate(columns, axis=1)
    return _Intervals(row, start, stop, step).at(np.lexsort((start, row)))


def _join(x: _Intervals) -> _Intervals:
    """Neighbours of step 1 joined where one ends and the next starts."""
    joins = (x.row[1:] == x.row[:-1]) & (x.start[1:] == x.stop[:-1])
    joins &= (x.step[1:] == 1) & (x.step[:-1] == 1)
    first, last = np.r_[True, ~joins], np.r_[~joins, True]
    return _Intervals(x.row[first], x.start[first], x.stop[last], x.step[first])


def _table(h0: int, h1: int, x: _Intervals, slot: np.ndarray) -> FlexTables:
    rows, row = np.unique(x.row, return_inverse=True)
    keys, start, stop = _used_keys(x)
    q_blocks, k_blocks = -(-len(rows) // BLOCK), -(-len(keys) // BLOCK)
    starts, stops = np.zeros((2, int(slot.max()) + 1, q_blocks * BLOCK), dtype=np.int32)
    steps = np.ones_like(starts)
    starts[slot, row], stops[slot, row], steps[slot, row] = start, stop, x.step
    dense = x.step == 1
    area = _block_sums(row[dense], start[dense], stop[dense], (q_blocks, k_blocks))
    touched = _block_sums(row, start, stop, (q_blocks, k_blocks)) > 0
    full = area == BLOCK * BLOCK
    return FlexTables(
        h0=h0,
        h1=h1,
        rows=rows,
        keys=keys,
        start=starts,
        stop=stops,
        step=None if dense.all() else steps,
        full=full,
        partial=touched & ~full,
    )


def _used_keys(x: _Intervals) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys inside any interval, and the intervals counted among them.

    The keys between those of a strided interval stay, so that its step stays what it is.
    """
    change = np.zeros(int(x.stop.max()) + 1, dtype=np.int64)
    np.add.at(change, x.start, 1)
    np.add.at(change, x.stop, -1)
    used = change.cumsum() > 0
    place = np.r_[0, used.cumsum()]
    return np.flatnonzero(used), place[x.start], place[x.stop]


def _block_sums(
    row: np.ndarray, start: np.ndarray, stop: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Keys in [start, stop), summed over the rows of each block: int64, `shape`.

    A block holds the keys from `start` on less those from `stop` on; of the keys from some edge on,
    the edge's own block holds a part and every later one `BLOCK`.
    """
    q_blocks, k_blocks = shape
    total = np.zeros((q_blocks, k_blocks + 1), dtype=np.int64)  # differences from block to block
    block_row = row // BLOCK
    for edge, sign in ((start, 1), (stop, -1)):
        block, inside = edge // BLOCK, edge % BLOCK
        np.add.at(total, (block_row, block), sign * (BLOCK - inside))
        later = np.minimum(block + 1, k_blocks)
        np.add.at(total, (block_row, later), sign * inside)
    return total[:, :k_blocks].cumsum(axis=1)

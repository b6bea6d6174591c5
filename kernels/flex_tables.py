"""Tiles as FlexAttention masks: which blocks are full or partial, and key intervals of every row.

Every row of a tile attends one interval of keys (every `step`-th key of it); neighbours are joined.
FlexAttention skips blocks without allowed pairs and tests no pair of a full one (Dong et al.,
arXiv 2412.05496), so only the intervals that reach into partial blocks are kept, numbered from
left to right. `SLOTS` of them make one mask, so that its test stays short; rows with more need
several masks, of which the first has all the full blocks.

Rows and keys that no tile uses are left out, because unfilled rows may hold anything and 0 * NaN is
NaN.
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
            They say what is allowed in partial blocks, and nothing about others.
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
        yield from _masks(h0, h1, _join(_sorted_intervals(mine)))


def _masks(h0: int, h1: int, x: _Intervals) -> Iterator[FlexTables]:
    rows, row = np.unique(x.row, return_inverse=True)
    keys, start, stop = _used_keys(x)
    x = _Intervals(row, start, stop, x.step)
    shape = -(-len(rows) // BLOCK), -(-len(keys) // BLOCK)
    full = _block_sums(x.at(x.step == 1), shape) == BLOCK * BLOCK
    x = x.at(_reaches_beyond(x, full))
    slot = np.arange(len(x.row)) - np.searchsorted(x.row, x.row)
    for low in range(0, max(1, int(slot.max(initial=0)) + 1), SLOTS):
        mine = (slot >= low) & (slot < low + SLOTS)
        part = x.at(mine)
        start, stop, step = _slot_tables(part, slot[mine] - low, shape[0] * BLOCK)
        partial = (_block_sums(part, shape) > 0) & ~full
        here = full if low == 0 else np.zeros_like(full)
        yield FlexTables(h0, h1, rows, keys, start, stop, step, here, partial)


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


def _slot_tables(
    x: _Intervals, slot: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    start, stop = np.zeros((2, int(slot.max(initial=0)) + 1, rows), dtype=np.int32)
    start[slot, x.row], stop[slot, x.row] = x.start, x.stop
    if (x.step == 1).all():
        return start, stop, None
    step = np.ones_like(start)
    step[slot, x.row] = x.step
    return start, stop, step


def _reaches_beyond(x: _Intervals, full: np.ndarray) -> np.ndarray:
    """bool: the interval has keys outside full blocks."""
    edge = np.zeros((len(full), 1), dtype=np.int64)
    count = np.hstack([edge, full.cumsum(axis=1)])
    first, last, block_row = x.start // BLOCK, (x.stop - 1) // BLOCK, x.row // BLOCK
    return count[block_row, last + 1] - count[block_row, first] <= last - first


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


def _block_sums(x: _Intervals, shape: tuple[int, int]) -> np.ndarray:
    """Keys in [start, stop), summed over the rows of each block: int64, `shape`.

    A block holds the keys from `start` on less those from `stop` on; of the keys from some edge on,
    the edge's own block holds a part and every later one `BLOCK`.
    """
    q_blocks, k_blocks = shape
    total = np.zeros((q_blocks, k_blocks + 1), dtype=np.int64)  # differences from block to block
    block_row = x.row // BLOCK
    for edge, sign in ((x.start, 1), (x.stop, -1)):
        block, inside = edge // BLOCK, edge % BLOCK
        np.add.at(total, (block_row, block), sign * (BLOCK - inside))
        later = np.minimum(block + 1, k_blocks)
        np.add.at(total, (block_row, later), sign * inside)
    return total[:, :k_blocks].cumsum(axis=1)

"""Cuts a tile list into work items: a block of rows of one side, and all it meets on the other.

One program of the band kernel owns one item, so that no two programs of a launch write the same
rows. `rows` are query rows for out and dq, key rows for dk and dv (`transposed`); `columns` are the
other side. Tiles of unequal step may share rows, so each step is a launch of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LIMIT = 1 << 30
"""Open bounds are cut to this, so that the device computes with 32-bit integers."""


@dataclass(frozen=True, eq=False)
class Items:
    """The items of one launch.

    Attributes:
        step: distance between the rows of an item, and between its columns.
        items: int32 (n, 4): first row, number of rows, and the item's range of `refs`.
        refs: int32 (m, 6): a tile that an item meets: r0 r1 c0 c1 lo hi. Row i meets column j iff
            r0 <= i < r1, c0 <= j < c1 and lo <= j - i <= hi, on the tile's lattice.
        heads: int32 (n, 2): the query heads [h0, h1) of an item.
        cost: int64 (n,): column blocks that an item visits.
    """

    step: int
    items: np.ndarray
    refs: np.ndarray
    heads: np.ndarray
    cost: np.ndarray


def transposed(tiles: np.ndarray) -> np.ndarray:
    """The table with queries and keys exchanged."""
    result = tiles.copy()
    for side, other in (("q0", "k0"), ("q1", "k1"), ("k0", "q0"), ("k1", "q1")):
        result[side] = tiles[other]
    result["lo"], result["hi"] = -tiles["hi"], -tiles["lo"]
    return result


def by_step(tiles: np.ndarray) -> list[np.ndarray]:
    """The tiles of each step: each a launch of its own."""
    return [tiles[tiles["step"] == step] for step in np.unique(tiles["step"])]


def step_items(tiles: np.ndarray, row_block: int, column_block: int) -> Items:
    """The items of one launch; rows in blocks of `row_block`, in no particular order.

    Args:
        tiles: dtype `TILE`, of one step.
        row_block: most rows of an item. column_block: columns visited at once.
    """
    parts = [_segment_items(part, row_block, column_block) for part in head_segments(tiles)]
    return _joined(parts, int(tiles["step"][0]))


def head_segments(tiles: np.ndarray) -> Iterator[np.ndarray]:
    """The tiles of each range of heads over which they are the same, cropped to it."""
    cuts = np.unique(np.concatenate([tiles["h0"], tiles["h1"]])).tolist()
    for h0, h1 in pairwise(cuts):
        part = tiles[(tiles["h0"] <= h0) & (tiles["h1"] >= h1)].copy()
        part["h0"], part["h1"] = h0, h1
        if len(part):
            yield part


def _joined(parts: list[Items], step: int) -> Items:
    items = [part.items.copy() for part in parts]
    offset = 0
    for table, part in zip(items, parts, strict=True):
        table[:, 2:] += offset
        offset += len(part.refs)
    return Items(
        step,
        np.concatenate(items),
        np.concatenate([part.refs for part in parts]),
        np.concatenate([part.heads for part in parts]),
        np.concatenate([part.cost for part in parts]),
    )


def _segment_items(tiles: np.ndarray, row_block: int, column_block: int) -> Items:
    """Items of tiles that share their step and heads."""
    rows = _Rows.of(tiles)
    pieces = _pieces(rows, row_block, column_block)
    piece, tile, visits = _meetings(rows, pieces, column_block)
    begin = np.searchsorted(piece, np.arange(len(pieces) + 1))
    count = pieces[:, 1] - pieces[:, 0]
    items = np.stack([rows.row(pieces[:, 0]), count, begin[:-1], begin[1:]], axis=1)
    heads = np.array([[tiles[name][0] for name in ("h0", "h1")]], dtype=np.int32)
    cost = np.bincount(piece, visits, len(items)).astype(np.int64)
    return Items(
        rows.step, items.astype(np.int32), rows.refs[tile], heads.repeat(len(items), 0), cost
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of tiles of one step, numbered so that rows `step` apart are neighbours.

    start, stop: the tiles' rows in these numbers, int64 (n,). refs: as in `Items`, one per tile.
    Residue classes follow each other, `apart` numbers each.
    """

    step: int
    apart: int
    start: np.ndarray
    stop: np.ndarray
    refs: np.ndarray

    @staticmethod
    def of(tiles: np.ndarray) -> "_Rows":
        step = int(tiles["step"][0])
        residue = tiles["q0"] % step
        apart = int(tiles["q1"].max()) // step + 2
        start = tiles["q0"] // step + residue * apart
        stop = (tiles["q1"] - 1 - residue) // step + 1 + residue * apart
        columns = [tiles[name] for name in ("q0", "q1", "k0", "k1", "lo", "hi")]
        refs = np.clip(np.stack(columns, axis=1), -LIMIT, LIMIT).astype(np.int32)
        return _Rows(step, apart, start, stop, refs)

    def row(self, number: np.ndarray) -> np.ndarray:
        """Buffer rows of such numbers."""
        return number % self.apart * self.step + number // self.apart


def _pieces(rows: _Rows, row_block: int, column_block: int) -> np.ndarray:
    """Disjoint ascending row ranges of at most `row_block` rows that cover all tiles, (n, 2).

    Rows are cut where the set of tiles changes: a block then visits no column for the sake of a few
    of its rows. Cuts closer than a block are given up where that saves visits, as it does where
    short ranges share a wide tile.
    """
    cuts = np.unique(np.concatenate([rows.start, rows.stop]))
    opened = np.bincount(np.searchsorted(cuts, rows.start), minlength=len(cuts))
    closed = np.bincount(np.searchsorted(cuts, rows.stop), minlength=len(cuts))
    covered = np.cumsum(opened - closed)[:-1] > 0
    segments = np.stack([cuts[:-1], cuts[1:]], axis=1)[covered]
    apart = _blocks(segments, row_block)
    short = segments[:, 1] - segments[:, 0] < row_block
    follows = np.zeros(len(segments), dtype=bool)
    follows[1:] = (segments[1:, 0] == segments[:-1, 1]) & short[1:] & short[:-1]
    if not follows.any():
        return apart
    heads = np.flatnonzero(~follows)
    tails = np.append(heads[1:], len(segments)) - 1
    runs = np.stack([segments[heads, 0], segments[tails, 1]], axis=1)
    joined = _blocks(runs, row_block)
    saves = _visits_of(rows, joined, runs, column_block) < _visits_of(
        rows, apart, runs, column_block
    )
    kept = [joined[saves[_run_of(joined, runs)]], apart[~saves[_run_of(apart, runs)]]]
    pieces = np.concatenate(kept)
    return pieces[np.argsort(pieces[:, 0])]


def _blocks(ranges: np.ndarray, most: int) -> np.ndarray:
    """Ranges (n, 2) cut into blocks of `most` from their starts."""
    count = -(-(ranges[:, 1] - ranges[:, 0]) // most)
    index, within = expand(count)
    first = ranges[index, 0] + within * most
    return np.stack([first, np.minimum(first + most, ranges[index, 1])], axis=1)


def expand(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, n) for every n in range(count[i]), in order of i."""
    index = np.repeat(np.arange(len(count)), count)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)


def _run_of(pieces: np.ndarray, runs: np.ndarray) -> np.ndarray:
    return np.searchsorted(runs[:, 0], pieces[:, 0], side="right") - 1


def _visits_of(rows: _Rows, pieces: np.ndarray, runs: np.ndarray, column_block: int) -> np.ndarray:
    """Column blocks that the pieces of each run visit."""
    piece, _, visits = _meetings(rows, pieces, column_block)
    return np.bincount(_run_of(pieces, runs)[piece], visits, len(runs))


def _meetings(
    rows: _Rows, pieces: np.ndarray, column_block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(piece, tile, column blocks visited) of all that share a row, by piece and first column."""
    first = np.searchsorted(pieces[:, 1], rows.start, side="right")
    last = np.searchsorted(pieces[:, 0], rows.stop, side="left")
    tile, within = expand(last - first)
    piece = first[tile] + within
    count = pieces[piece, 1] - pieces[piece, 0]
    begin, end = column_visits(rows.refs[tile], rows.row(pieces[piece, 0]), count, rows.step)
    visits = np.maximum(-(-(end - begin) // (rows.step * column_block)), 0)
    order = np.lexsort((begin, piece))
    return piece[order], tile[order], visits[order]


def column_visits(
    refs: np.ndarray, row: np.ndarray, rows: np.ndarray, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """[first, last) of the columns that blocks of rows visit in refs, as the kernel finds them.

    refs: int32 (n, 6); row, rows: first row and number of rows of each block, int64 (n,).
    """
    r0, r1, c0, c1, lo, hi = refs.astype(np.int64).T
    first = np.maximum(c0, np.maximum(row, r0) + lo)
    first = c0 + -(-(first - c0) // step) * step
    return first, np.minimum(c1, np.minimum(row + (rows - 1) * step + 1, r1) + hi)

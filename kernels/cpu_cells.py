"""Cuts a band into cells that an attention op without band support computes well.

A cell is a rectangle of which everything is allowed, or a strip: a few rows with a mask and all
keys that any of them attends, or a few keys with all rows. Cells of one band are disjoint. All
coordinates are those of one lattice (see `LatticeTile`).

Narrow bands and small triangles are strips throughout: each row belongs to one cell, at the price
of half a strip's height of masked keys per row and edge. Large triangles are cut like a binary
tree: diagonal blocks (strips, or causal cells), then squares of once, twice, four times ... their
side beside them, which no mask slows down. Equal cells lie at one stride, so that they batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from ringattn.kernels.lattice import LatticeTile

BLOCK = 1024
CELL_ROWS = 2048
"""Taller rectangles are cut, so that a partial result stays in cache until it is merged."""
ROUND = 16
"""Matrix products are faster where the number of keys is a multiple of this."""
CAUSAL_BLOCK = 2048
"""Diagonal blocks where the op's own causal flag is used; it gains from `BLOCK` rows on."""
OPEN = 1 << 40


@dataclass(frozen=True)
class Cell:
    """Query rows [q0, q0 + rows) against key rows [k0, k0 + keys).

    Local row a attends local key b iff lo <= b - a <= hi; lo and hi are None where that is always
    so. A causal cell is square and row a attends keys b <= a; its lo and hi are None.
    """

    q0: int
    rows: int
    k0: int
    keys: int
    lo: int | None = None
    hi: int | None = None
    causal: bool = False


@dataclass(frozen=True)
class _Cut:
    """How to cut: rows per strip, and whether large upper triangles are left whole, as causal."""

    strip: int
    causal_upper: bool


@dataclass(frozen=True)
class _Band:
    """Keys [first, stop) with lo <= key - row <= hi."""

    first: int
    stop: int
    lo: int
    hi: int


def row_strip_cells(tile: LatticeTile, strip: int) -> Iterator[Cell]:
    """The cells of a band, with strips of `strip` rows; every row of a cell attends a key of it."""
    return _cells(tile, _Cut(strip, causal_upper=False))


def key_strip_cells(tile: LatticeTile, strip: int, *, causal: bool) -> Iterator[Cell]:
    """The cells of a band cut the other way: strips of `strip` keys and all rows that attend them.

    Some rows of a strip may attend none of its keys. With `causal`, large triangles under a
    diagonal become causal cells.
    """
    turned = replace(tile, rows=tile.keys, keys=tile.rows, lo=-tile.hi, hi=-tile.lo)
    for c in _cells(turned, _Cut(strip, causal_upper=causal)):
        lo, hi = (None, None) if c.lo is None or c.hi is None else (-c.hi, -c.lo)
        yield Cell(c.k0, c.keys, c.q0, c.rows, lo, hi, c.causal)


def _cells(tile: LatticeTile, cut: _Cut) -> Iterator[Cell]:
    """The rows are cut where an edge of the band meets the side of the key range: between such rows
    the left edge is the side or a diagonal, and so is the right edge. In the row where they meet,
    the edge is both; a band that has only that row of a diagonal has none.
    """
    band = _Band(0, tile.keys, tile.lo, tile.hi)
    start, stop = max(0, -tile.hi), min(tile.rows, tile.keys - tile.lo)
    left_turn = min(max(-tile.lo, start), stop)  # from this row on, the left edge is a diagonal
    right_turn = min(max(tile.keys - tile.hi, start), stop)  # and the right edge the side
    left_turn = stop if left_turn == stop - 1 else left_turn
    right_turn = start if right_turn == start + 1 else right_turn
    for a0, a1 in pairwise(sorted({start, left_turn, right_turn, stop})):
        diagonal_left, diagonal_right = a0 >= left_turn, a1 <= right_turn
        if diagonal_left and diagonal_right:
            yield from _parallelogram(a0, a1, band, cut)
            continue
        first = a1 + tile.lo if diagonal_left else 0
        last = a0 + tile.hi if diagonal_right else tile.keys
        if (diagonal_left or diagonal_right) and max(a1 - a0, last - first) < BLOCK:
            yield from _strips(a0, a1, band, cut.strip)
            continue
        yield from _full(a0, a1 - a0, first, last - first)
        if diagonal_left:
            yield from _triangle(a0, a0 + tile.lo, a1 - a0, cut, upper=True)
        if diagonal_right:
            yield from _triangle(a0, a0 + tile.hi, a1 - a0, cut, upper=False)


def _full(q0: int, rows: int, k0: int, keys: int) -> Iterator[Cell]:
    if keys <= 0:
        return
    while rows > 0:
        count = CELL_ROWS if rows >= 1.5 * CELL_ROWS else rows
        yield Cell(q0, count, k0, keys)
        q0, rows = q0 + count, rows - count


def _strips(a0: int, a1: int, band: _Band, strip: int) -> Iterator[Cell]:
    """Rows [a0, a1) of a band in strips, each with the keys from its first row's to its last's.

    The keys of a strip are rounded up as far as the band has keys; the mask excludes them.
    """
    for q0 in range(a0, a1, strip):
        rows = min(strip, a1 - q0)
        k0, k1 = max(band.first, q0 + band.lo), min(band.stop, q0 + rows + band.hi)
        lo, hi = band.lo + q0 - k0, band.hi + q0 - k0
        if lo <= 1 - rows and hi >= k1 - k0 - 1:
            yield Cell(q0, rows, k0, k1 - k0)
            continue
        keys = min(-(-(k1 - k0) // ROUND) * ROUND, band.stop - k0)
        yield Cell(q0, rows, k0, keys, max(lo, -rows), min(hi, keys))


def _parallelogram(a0: int, a1: int, band: _Band, cut: _Cut) -> Iterator[Cell]:
    """Rows [a0, a1), each attending keys [a + lo, a + hi].

    Narrow ones are strips. Wide ones are blocks of rows no taller than wide, each an upper
    triangle, a rectangle and a lower triangle without its diagonal.
    """
    width = band.hi - band.lo + 1
    if width < 2 * BLOCK:
        yield from _strips(a0, a1, band, min(cut.strip, max(cut.strip // 4, width)))
        return
    side = BLOCK
    while 2 * side <= min(width, a1 - a0):
        side *= 2
    for q0 in range(a0, a1, side):
        rows = min(side, a1 - q0)
        k0 = q0 + band.lo
        yield from _full(q0, rows, k0 + rows, width - rows)
        yield from _triangle(q0, k0, rows, cut, upper=True)
        yield from _triangle(q0 + 1, k0 + width, rows - 1, cut, upper=False)


def _triangle(q0: int, k0: int, side: int, cut: _Cut, *, upper: bool) -> Iterator[Cell]:
    """Row q0 + a attends key k0 + b iff b >= a (upper) or b <= a, for a and b in [0, side)."""
    lo, hi = (k0 - q0, OPEN) if upper else (-OPEN, k0 - q0)
    causal = upper and cut.causal_upper
    square = CAUSAL_BLOCK if causal else BLOCK
    for at in range(0, side, square):
        stop = min(at + square, side)
        if causal and stop - at >= BLOCK:
            yield Cell(q0 + at, stop - at, k0 + at, stop - at, causal=True)
        else:
            yield from _strips(q0 + at, q0 + stop, _Band(k0 + at, k0 + stop, lo, hi), cut.strip)
    while square < side:
        for at in range(0, side - square, 2 * square):
            tail = min(square, side - at - square)
            if upper:
                yield from _full(q0 + at, square, k0 + at + square, tail)
            else:
                yield from _full(q0 + at + square, tail, k0 + at, square)
        square *= 2

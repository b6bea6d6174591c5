"""Cuts a band into cells that an attention op without band support computes well.

A cell is a rectangle of which everything is allowed, or a small block that an edge of the band
crosses, given with a mask. Cells of one band are disjoint. All coordinates are those of one
lattice (see `LatticeTile`); a full cell has ``lo = hi = None``.

A triangle is cut like a binary tree: diagonal blocks of `LEAF` rows (masked), then squares of
LEAF, 2 LEAF, 4 LEAF ... rows below (or above) the diagonal blocks. All squares of one size lie at
one stride, so that each size is one batched call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ringattn.kernels.lattice import LatticeTile

LEAF = 128
CALL_ROWS = 2048
"""Taller rectangles are cut, so that a partial result stays in cache until it is merged."""
OPEN = 1 << 40


@dataclass(frozen=True)
class Cell:
    """Query rows [q0, q0 + rows) against key rows [k0, k0 + keys).

    With a mask, local row a attends local key b iff lo <= b - a <= hi.
    """

    q0: int
    rows: int
    k0: int
    keys: int
    lo: int | None = None
    hi: int | None = None


def band_cells(tile: LatticeTile) -> Iterator[Cell]:
    """The cells of a band.

    The rows are cut where an edge of the band meets the side of the key range: between such rows
    the left edge is the side or a diagonal, and so is the right edge.
    """
    start, stop = max(0, -tile.hi), min(tile.rows, tile.keys - tile.lo)
    left_turn = min(max(-tile.lo, start), stop)  # from this row on, the left edge is a diagonal
    right_turn = min(max(tile.keys - tile.hi, start), stop)  # and the right edge the side
    cuts = sorted({start, left_turn, right_turn, stop})
    for a0, a1 in pairwise(cuts):
        diagonal_left, diagonal_right = a0 >= left_turn, a1 <= right_turn
        if diagonal_left and diagonal_right:
            yield from _parallelogram(a0, a1, tile.lo, tile.hi, tile.keys)
            continue
        first = a1 + tile.lo if diagonal_left else 0
        last = a0 + tile.hi if diagonal_right else tile.keys
        yield from _full(a0, a1 - a0, first, last - first)
        if diagonal_left:
            yield from _triangle(a0, a0 + tile.lo, a1 - a0, upper=True)
        if diagonal_right:
            yield from _triangle(a0, a0 + tile.hi, a1 - a0, upper=False)


def _full(q0: int, rows: int, k0: int, keys: int) -> Iterator[Cell]:
    if keys <= 0:
        return
    while rows > 0:
        count = CALL_ROWS if rows >= 1.5 * CALL_ROWS else rows
        yield Cell(q0, count, k0, keys)
        q0, rows = q0 + count, rows - count


def _parallelogram(a0: int, a1: int, lo: int, hi: int, key_stop: int) -> Iterator[Cell]:
    """Rows [a0, a1), each attending keys [a + lo, a + hi]: blocks of rows no taller than wide.

    A block is an upper triangle, a rectangle and a strict lower triangle.
    """
    width = hi - lo + 1
    if width <= LEAF:
        yield from _thin_band(a0, a1, lo, hi)
        return
    side = LEAF
    while 2 * side <= min(width, a1 - a0):
        side *= 2
    while a0 < a1:
        side = min(side, a1 - a0)
        blocks = (a1 - a0) // side
        for block in range(a0, a0 + blocks * side, side):
            yield from _full(block, side, block + lo + side, width - side)
        for block in range(a0, a0 + blocks * side, side):
            yield from _triangle(block, block + lo, side, upper=True)
            k0 = block + lo + width
            yield from _triangle(block, k0, side, upper=False, strict=True, key_stop=key_stop)
        a0 += blocks * side


def _thin_band(a0: int, a1: int, lo: int, hi: int) -> Iterator[Cell]:
    """A band narrower than a leaf: masked blocks that hold a whole stretch of it."""
    for block in range(a0, a1, LEAF):
        rows = min(LEAF, a1 - block)
        yield Cell(block, rows, block + lo, rows + hi - lo, 0, hi - lo)


def _triangle(
    q0: int,
    k0: int,
    side: int,
    *,
    upper: bool,
    strict: bool = False,
    key_stop: int = OPEN,
) -> Iterator[Cell]:
    """Row a attends key b >= a (upper) or b <= a (b < a if strict), a and b in [0, side).

    The last key of a strict triangle is unused. It stays in the masked blocks, to keep their sizes
    round, unless it is `key_stop` or beyond.
    """
    for at in range(0, side, LEAF):
        rows = min(LEAF, side - at)
        low, high = (0, rows) if upper else (-rows, -1 if strict else 0)
        if not strict or rows > 1:
            yield Cell(q0 + at, rows, k0 + at, min(rows, key_stop - k0 - at), low, high)
    square = LEAF
    while square < side:
        for at in range(0, side - square, 2 * square):
            tail = min(square, side - at - square)
            if upper:
                yield from _full(q0 + at, square, k0 + at + square, tail)
            else:
                yield from _full(q0 + at + square, tail, k0 + at, square)
        square *= 2

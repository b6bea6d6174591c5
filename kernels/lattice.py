"""A tile on its own lattice: strides removed, so that kernels see unit-step bands only."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LatticeTile:
    """Row a is query-buffer row q0 + a * step, key b is key-buffer row k0 + b * step.

    Row a attends key b iff lo <= b - a <= hi, for a in [0, rows), b in [0, keys),
    query heads h0 <= h < h1.
    """

    h0: int
    h1: int
    q0: int
    k0: int
    step: int
    rows: int
    keys: int
    lo: int
    hi: int


def lattice_tiles(tiles: np.ndarray) -> tuple[LatticeTile, ...]:
    """Rows of a `TILE` table on their own lattices; rows that allow no pair are dropped."""
    return tuple(t for t in map(_lattice_tile, tiles) if _allows_a_pair(t))


def _lattice_tile(row: np.void) -> LatticeTile:
    h0, h1, q0, q1, k0, k1, lo, hi, step = (int(x) for x in row)
    shift = k0 - q0
    return LatticeTile(
        h0=h0,
        h1=h1,
        q0=q0,
        k0=k0,
        step=step,
        rows=-(-(q1 - q0) // step),
        keys=-(-(k1 - k0) // step),
        lo=-((shift - lo) // step),
        hi=(hi - shift) // step,
    )


def _allows_a_pair(tile: LatticeTile) -> bool:
    return (
        tile.h0 < tile.h1
        and tile.rows > 0
        and tile.keys > 0
        and max(tile.lo, 1 - tile.rows) <= min(tile.hi, tile.keys - 1)
    )

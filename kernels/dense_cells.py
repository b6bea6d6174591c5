"""Cuts a tile into rectangles and squares under a diagonal, for ops that know no other mask."""

from ringattn.kernels.band_windows import tight
from ringattn.kernels.cpu_cells import Cell
from ringattn.kernels.lattice import LatticeTile


def dense_cells(tile: LatticeTile) -> tuple[Cell, ...] | None:
    """Disjoint full and causal cells that together are the tile, or None where it has a left edge.

    Row a attends keys b <= a + hi: `hi` keys before the square that starts at row 0 and key `hi`,
    the square, and the rows below it, which attend everything. The tile must be tight.
    """
    if tile.lo > 1 - tile.rows:
        return None
    if tile.hi >= tile.keys - 1:
        return (Cell(0, tile.rows, 0, tile.keys),)
    side = min(tile.rows, tile.keys - tile.hi)
    cells = [Cell(0, side, tile.hi, side, causal=True)]
    if tile.hi:
        cells.append(Cell(0, side, 0, tile.hi))
    if side < tile.rows:
        cells.append(Cell(side, tile.rows - side, 0, tile.keys))
    return tuple(cells)


def is_dense(tile: LatticeTile, smallest: int) -> bool:
    """Whether the tile falls into dense cells of at least `smallest` rows and keys each."""
    cells = dense_cells(tight(tile))
    return cells is not None and all(min(c.rows, c.keys) >= smallest for c in cells)

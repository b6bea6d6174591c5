"""What the CPU flash kernel does for a tile table, counted without running it."""

from dataclasses import astuple, dataclass
from functools import partial

import numpy as np

from ringattn.kernels.block_matrix import BlockTiles
from ringattn.kernels.block_rows import row_tiles
from ringattn.kernels.cpu_calls import build_calls
from ringattn.kernels.cpu_cells import key_strip_cells, row_strip_cells
from ringattn.kernels.cpu_flash import BACKWARD_STRIP, FORWARD_STRIP
from ringattn.kernels.heads import head_parts


@dataclass(frozen=True)
class CallCounts:
    """Work of one launch.

    Attributes:
        pairs, rows, keys: of all calls, times their heads; masked pairs count.
        calls: of the operator. masks: elements of the masks that are made.
        matrix: allowed pairs in block matrices, times their heads. products: of block matrices.
    """

    pairs: float = 0.0
    rows: float = 0.0
    keys: float = 0.0
    calls: float = 0.0
    masks: float = 0.0
    matrix: float = 0.0
    products: float = 0.0

    def __add__(self, other: "CallCounts") -> "CallCounts":
        return CallCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def band_counts(tiles: np.ndarray, group: int, *, backward: bool) -> CallCounts:
    """The calls of a table of dtype `TILE`, in a dtype that is not 16-bit.

    Args:
        group: query heads of a key head. backward: count the backward's calls.
    """
    cells = partial(row_strip_cells, strip=FORWARD_STRIP)
    if backward:
        cells = partial(key_strip_cells, strip=BACKWARD_STRIP, causal=False)
    total = CallCounts()
    for call in build_calls(tiles, cells):
        heads = call.h1 - call.h0
        pairs = call.rows * call.keys
        total += CallCounts(
            pairs=float(call.count * pairs * heads),
            rows=float(call.count * call.rows * heads),
            keys=float(call.count * call.keys * heads),
            calls=float(len(list(head_parts(call.h0, call.h1, group)))),
            masks=float(pairs) if call.lo is not None else 0.0,
        )
    return total


def block_counts(blocks: BlockTiles, area: np.ndarray, group: int) -> CallCounts:
    """The products of block tiles. `area` holds each tile's allowed pairs of one head."""
    total = CallCounts()
    for tile, pairs in zip(row_tiles(blocks), area, strict=True):
        parts = len(list(head_parts(tile.h0, tile.h1, group)))
        total += CallCounts(
            matrix=float(pairs * (tile.h1 - tile.h0)), products=float(len(tile.rows) * parts)
        )
    return total

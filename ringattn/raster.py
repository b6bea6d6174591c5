"""A mask and a layout seen through a coarse grid of cells, for pictures of any sequence length.

Cells are near-equal runs of tokens on both axes. Areas are exact whatever the sequence length,
because bands are cropped to cells and have a closed form; no dense matrix is made.
"""

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import ceil_div, expand_ranges
from ringattn.blocks import plain_bands
from ringattn.layout import Layout
from ringattn.masks import Mask

_BANDS_AT_ONCE = 4096  # bounds memory: one band may touch every row of cells


def cell_edges(seq_len: int, most: int) -> np.ndarray:
    """Edges of at most `most` near-equal cells over [0, seq_len), int64 (cells + 1,)."""
    cells = max(1, min(seq_len, most))
    return np.arange(cells + 1, dtype=np.int64) * seq_len // cells


def cell_areas(mask: Mask, edges: np.ndarray) -> np.ndarray:
    """Allowed pairs in each cell, exact; int64 (cells of queries, cells of keys).

    Args:
        mask: any mask. Layers of `mask.dense()` are added up; blocks that may be selected at run
            time count.
        edges: increasing cell edges from 0 to `mask.seq_len`, the same for queries and keys.
    """
    cells = len(edges) - 1
    total = np.zeros((cells, cells), dtype=np.int64)
    bands, copies = plain_bands(mask)
    for start in range(0, len(bands), _BANDS_AT_ONCE):
        here = slice(start, start + _BANDS_AT_ONCE)
        by_row, origin, row = _cut(bands[here], "q", edges)
        # Tight bands name only the keys that they use, so that few columns are visited.
        by_row, kept = band_ops.tighten(by_row)
        by_cell, source, column = _cut(by_row, "k", edges)
        weight = copies[here][origin[kept][source]]
        np.add.at(total, (row[kept][source], column), weight * band_ops.area(by_cell))
    return total


def _cut(
    bands: np.ndarray, axis: str, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bands cropped to each cell that they touch on one axis: (parts, band and cell of each)."""
    low, high = axis + "0", axis + "1"
    first = np.searchsorted(edges, bands[low], side="right") - 1
    last = np.searchsorted(edges, bands[high], side="left")
    which, cell = expand_ranges(first, last)
    part = bands[which]
    # The origin goes up to the next position on the band's lattice.
    skipped = np.maximum(ceil_div(edges[cell] - part[low], part["step"]), 0)
    part[low] += skipped * part["step"]
    part[high] = np.minimum(part[high], edges[cell + 1])
    return part, which, cell


def owned_tokens(layout: Layout, edges: np.ndarray) -> np.ndarray:
    """Tokens of each cell that each rank owns, int64 (cells, P)."""
    ranges = layout.ranges
    first = np.searchsorted(edges, ranges["start"], side="right") - 1
    last = np.searchsorted(edges, ranges["stop"], side="left")
    which, cell = expand_ranges(first, np.minimum(last, len(edges) - 1))
    start, step = ranges["start"][which], ranges["step"][which]
    count = ceil_div(ranges["stop"][which] - start, step)

    def before(position: np.ndarray) -> np.ndarray:
        return np.clip(ceil_div(position - start, step), 0, count)

    owned = np.zeros((len(edges) - 1, layout.world), dtype=np.int64)
    tokens = before(edges[cell + 1]) - before(edges[cell])
    np.add.at(owned, (cell, ranges["owner"][which]), tokens)
    return owned

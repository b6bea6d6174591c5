"""Masks as MagiAttention's slices: rectangles of queries and keys, each with a diagonal or two.

A slice of type "full" allows all of its rectangle, "causal" what lies on or before the diagonal
through its lower right corner, "inv_causal" what lies on or behind the one through its upper left
corner, "bi_causal" both.
"""

from itertools import pairwise

import numpy as np

from ringattn.blocks import plain_bands
from ringattn.masks import Mask

Slice = tuple[int, int, int, int, str]
_TYPES = {
    (False, False): "full",
    (False, True): "causal",
    (True, False): "inv_causal",
    (True, True): "bi_causal",
}


def slices_refusal(mask: Mask) -> str | None:
    """Why a mask has no slices, in one line; None if it has."""
    if not mask.is_uniform:
        return "its slices are the same for all heads"
    strided = mask.bands["step"] > 1
    rows = np.where(strided, -(-(mask.bands["q1"] - mask.bands["q0"]) // mask.bands["step"]), 1)
    if (rows > 1).any():
        return "its slices are of consecutive tokens, not strided"
    return None


def attention_slices(mask: Mask) -> list[Slice]:
    """(first query, last + 1, first key, last + 1, type), disjoint, of a mask with slices."""
    bands, _ = plain_bands(mask)
    return [piece for band in bands.tolist() for piece in _of_band(*band[:6])]


def _of_band(q0: int, q1: int, k0: int, k1: int, lo: int, hi: int) -> list[Slice]:
    """Cuts the rows where a side of the band changes between the rectangle's and a diagonal."""
    left, right = k0 - lo, k1 - 1 - hi  # the last row that begins at k0; the first that ends at k1
    cuts = sorted({q0, q1, *(row for row in (left + 1, right) if q0 < row < q1)})
    pieces = []
    for a, b in pairwise(cuts):
        lower, upper = a > left, b - 1 < right
        first = a + lo if lower else k0
        stop = b + hi if upper else k1
        pieces.append((a, b, first, stop, _TYPES[lower, upper]))
    return pieces

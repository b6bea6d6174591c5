"""Bands restricted by block matrices: exact areas, and dense pictures."""

from typing import TYPE_CHECKING

import numpy as np

from ringattn import bands as band_ops
from ringattn.kernels.block_matrix import BlockMatrix
from ringattn.tiles import cropped_area

if TYPE_CHECKING:
    from ringattn.mask import Mask


def restricted_area(mask: "Mask") -> np.ndarray:
    """Allowed pairs of each band, int64 (bands,). Of run-time blocks: of a full selection."""
    areas = band_ops.area(mask.bands)
    for index in np.flatnonzero(mask.matrix >= 0):
        areas[index] = block_row_areas(mask, int(index)).sum()
    return areas


def block_row_areas(mask: "Mask", index: int) -> np.ndarray:
    """Allowed pairs of each block of queries of one band with a matrix, int64 (nq,)."""
    matrix, band = mask.matrices[mask.matrix[index]], mask.bands[index : index + 1]
    if matrix.allowed is None:
        return _selected_areas(mask, matrix, band)
    if is_open(band)[0]:
        rows, keys = (_overlap(matrix, band[0], axis) for axis in "qk")
        return rows * (matrix.allowed @ keys)
    q, k = np.nonzero(matrix.allowed)
    areas = np.zeros(len(matrix.allowed), dtype=np.int64)
    cells = np.repeat(band, len(q))
    _crop_to_blocks(cells, matrix, q, k)
    np.add.at(areas, q, band_ops.area(cells))
    return areas


def _selected_areas(mask: "Mask", matrix: BlockMatrix, band: np.ndarray) -> np.ndarray:
    """The blocks on the diagonal, and others up to `top_k`, as far as the band has pairs."""
    assert mask.routing is not None
    start, stop = matrix.q_edges[:-1], matrix.q_edges[1:]
    total = cropped_area(band, start, stop)
    first = np.searchsorted(matrix.k_edges, start, side="right") - 1
    last = np.searchsorted(matrix.k_edges, stop, side="left")
    own = band[np.zeros(len(start), dtype=int)]
    own["q0"], own["q1"] = np.maximum(band["q0"], start), np.minimum(band["q1"], stop)
    own["k0"] = np.maximum(band["k0"], matrix.k_edges[first])
    own["k1"] = np.minimum(band["k1"], matrix.k_edges[last])
    rows = np.maximum(own["q1"] - own["q0"], 0)
    others = np.maximum(mask.routing.top_k - (last - first), 0) * int(np.diff(matrix.k_edges).max())
    return np.minimum(total, band_ops.area(own) + rows * others)


def _overlap(matrix: BlockMatrix, band: np.void, axis: str) -> np.ndarray:
    """Tokens of each block that the band covers."""
    edges = matrix.q_edges if axis == "q" else matrix.k_edges
    return np.diff(np.clip(edges, band[axis + "0"], band[axis + "1"]))


def is_open(bands: np.ndarray) -> np.ndarray:
    """bool per band: whether all pairs of its rectangle lie between lo and hi."""
    above = bands["hi"] >= bands["k1"] - 1 - bands["q0"]
    return above & (bands["lo"] <= bands["k0"] - (bands["q1"] - 1))


def _crop_to_blocks(bands: np.ndarray, matrix: BlockMatrix, q: np.ndarray, k: np.ndarray) -> None:
    """Crops each band to its block (q, k), in place."""
    for axis, block, edges in (("q", q, matrix.q_edges), ("k", k, matrix.k_edges)):
        bands[axis + "0"] = np.maximum(bands[axis + "0"], edges[block])
        bands[axis + "1"] = np.minimum(bands[axis + "1"], edges[block + 1])


def dense_group(mask: "Mask", group: int) -> np.ndarray:
    """The bool (S, S) matrix of a head group; every block of a run-time matrix counts."""
    allowed = np.zeros((mask.seq_len, mask.seq_len), dtype=bool)
    for number in np.unique(mask.matrix[mask.group == group]):
        pick = (mask.group == group) & (mask.matrix == number)
        part = band_ops.dense(mask.bands[pick], mask.seq_len)
        if number >= 0 and (known := mask.matrices[number].allowed) is not None:
            matrix = mask.matrices[number]
            rows = np.repeat(known, np.diff(matrix.q_edges), axis=0)
            part &= np.repeat(rows, np.diff(matrix.k_edges), axis=1)
        allowed |= part
    return allowed


def plain_bands(mask: "Mask") -> tuple[np.ndarray, np.ndarray]:
    """The mask without matrices: one band per allowed block, and the layers that each stands for.

    Bands whose blocks are selected at run time stay whole.
    """
    copies = np.array([mask.copies(group) for group in range(len(mask.heads))])[mask.group]
    whole = ~mask.is_restricted
    tables, weights = [mask.bands[whole]], [copies[whole]]
    for index in np.flatnonzero(mask.is_restricted):
        matrix = mask.matrices[mask.matrix[index]]
        q, k = np.nonzero(matrix.allowed)
        cells = np.repeat(mask.bands[index : index + 1], len(q))
        _crop_to_blocks(cells, matrix, q, k)
        tables.append(band_ops.tighten(cells)[0])
        weights.append(np.full(len(tables[-1]), copies[index]))
    return np.concatenate(tables), np.concatenate(weights)


def row_area(mask: "Mask", start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """See `Mask.row_area`. A block's pairs are taken to be spread evenly over its rows."""
    copies = np.array([mask.copies(group) for group in range(len(mask.heads))])
    plain = mask.matrix < 0
    total = np.zeros(len(start), dtype=np.int64)
    for group in range(len(mask.heads)):
        pick = plain & (mask.group == group)
        total += copies[group] * cropped_area(mask.bands[pick], start, stop)
    for index in np.flatnonzero(~plain):
        edges = mask.matrices[mask.matrix[index]].q_edges
        below = np.concatenate([[0], np.cumsum(block_row_areas(mask, int(index)))])
        spread = np.interp(np.stack([start, stop]), edges, below).astype(np.int64)
        total += copies[mask.group[index]] * (spread[1] - spread[0])
    return total

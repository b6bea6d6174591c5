"""Bands restricted by block matrices: exact areas, and tiles cropped to allowed blocks."""

from typing import TYPE_CHECKING

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import BAND, BAND_FIELDS
from ringattn.kernels.block_matrix import BlockMatrix, spans
from ringattn.tiles import PIECE, cropped_area, intersect

if TYPE_CHECKING:
    from ringattn.mask import Mask

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # first row, last row + 1, allowed pairs


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
    if _is_open(band)[0]:
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


def _is_open(bands: np.ndarray) -> np.ndarray:
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
    known = np.array([m.allowed is not None for m in mask.matrices] + [False])
    restricted = np.flatnonzero((mask.matrix >= 0) & known[mask.matrix])
    whole = np.ones(len(mask.bands), dtype=bool)
    whole[restricted] = False
    tables, weights = [mask.bands[whole]], [copies[whole]]
    for index in restricted:
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


def see(mask: "Mask", q_segments: np.ndarray, k_segments: np.ndarray) -> np.ndarray:
    """All tiles of a mask over pairs of a query and a key segment of the same group.

    As `ringattn.tiles.intersect`; where a band has a known matrix, tiles without an allowed block
    are left out, and the others cropped to the keys that they need and counted exactly.
    """
    pieces = intersect(mask.bands, q_segments, k_segments)
    if not len(mask.matrices):
        return pieces
    known = np.array([m.allowed is not None for m in mask.matrices])
    number = mask.matrix[pieces["band"]]
    restricted = (number >= 0) & known[number]
    keep = np.ones(len(pieces), dtype=bool)
    slow = restricted & (~_is_open(pieces) | (pieces["pitch"] > 1))
    for index in np.flatnonzero(slow):
        columns = _columns(pieces[index], mask.matrices[number[index]])
        keep[index] = _crop(pieces[index : index + 1], columns)
    fast = np.flatnonzero(restricted & ~slow)
    # Tiles of one run of queries and one matrix share the allowed rows of each block of keys.
    keys = np.stack([pieces[n][fast] for n in ("qseg", "band", "q0", "q1")], axis=1)
    order = np.lexsort(keys.T[::-1])
    starts = np.flatnonzero(np.any(np.diff(keys[order], axis=0), axis=1)) + 1
    for part in np.split(fast[order], starts):
        if len(part):
            keep[part] = _crop_together(pieces, part, mask.matrices[number[part[0]]])
    _estimate(mask, pieces, (number >= 0) & ~known[number])
    return pieces[keep]


def _estimate(mask: "Mask", pieces: np.ndarray, selected: np.ndarray) -> None:
    """Areas of tiles with run-time blocks: the share that a full selection allows."""
    number = mask.matrix[pieces["band"]]
    for matrix in np.unique(number[selected]):
        here = selected & (number == matrix)
        pieces["area"][here] = np.ceil(pieces["area"][here] * _share(mask, int(matrix)))


def _crop(piece: np.ndarray, columns: Columns) -> bool:
    """Crops one piece, a view, to its allowed columns; False where there are none."""
    first, last, count = columns
    if not len(first):
        return False
    piece["k0"], piece["k1"], piece["area"] = first.min(), last.max(), count.sum()
    return True


def _crop_together(pieces: np.ndarray, index: np.ndarray, matrix: BlockMatrix) -> np.ndarray:
    """Crops open pieces with equal query rows; returns which of them allow a pair."""
    piece = pieces[index[0]]
    held = spans(matrix.q_edges, int(piece["q_token"]), 1, int(piece["q0"]), int(piece["q1"]))
    assert matrix.allowed is not None
    rows = np.array([s.last - s.first for s in held])
    allowed = rows @ matrix.allowed[[s.block for s in held]]  # query rows per block of keys
    blocks = np.flatnonzero(allowed)
    if not len(blocks):
        return np.zeros(len(index), dtype=bool)
    edges, token = matrix.k_edges, pieces["k_token"][index]
    below = np.concatenate([[0], np.cumsum(allowed * np.diff(edges))])
    low, high = pieces["k0"][index] + token, pieces["k1"][index] + token

    def pairs_below(tokens: np.ndarray) -> np.ndarray:
        block = np.minimum(np.searchsorted(edges, tokens, side="right") - 1, len(allowed) - 1)
        return below[block] + allowed[block] * (tokens - edges[block])

    area = pairs_below(high) - pairs_below(low)
    first = np.minimum(np.searchsorted(edges[blocks + 1], low, side="right"), len(blocks) - 1)
    last = np.maximum(np.searchsorted(edges[blocks], high, side="left") - 1, 0)
    pieces["k0"][index] = np.maximum(low, edges[blocks[first]]) - token
    pieces["k1"][index] = np.minimum(high, edges[blocks[last] + 1]) - token
    pieces["area"][index] = area
    return area > 0


def _columns(piece: np.void, matrix: BlockMatrix) -> Columns:
    """The key rows of a piece in blocks that allow a pair, with their pairs."""
    assert matrix.allowed is not None
    pitch = int(piece["pitch"])
    rows, keys = (
        spans(edges, int(piece[a + "_token"]), pitch, int(piece[a + "0"]), int(piece[a + "1"]))
        for a, edges in (("q", matrix.q_edges), ("k", matrix.k_edges))
    )
    part = matrix.allowed[np.ix_([s.block for s in rows], [s.block for s in keys])]
    q, k = np.nonzero(part)
    cells = np.empty(len(q), dtype=BAND)
    for name in BAND_FIELDS:
        cells[name] = piece[name]
    for axis, held, at in (("q", rows, q), ("k", keys, k)):
        for name, value in ((axis + "0", "first"), (axis + "1", "last")):
            cells[name] = np.array([getattr(s, value) for s in held], dtype=np.int64)[at]
    count = np.zeros(len(keys), dtype=np.int64)
    np.add.at(count, k, band_ops.area(cells))
    used = np.flatnonzero(count)
    first, last = (
        np.array([getattr(keys[i], n) for i in used], np.int64) for n in ("first", "last")
    )
    return first, last, count[used]


def piece_area(mask: "Mask", piece: np.void, band: np.ndarray) -> int:
    """Allowed pairs of one tile (`band`, one row) with a matrix.

    `piece` holds its matrix, q_token, k_token and pitch, as a task does.
    """
    matrix = mask.matrices[piece["matrix"]]
    if matrix.allowed is not None:
        part = np.zeros(1, dtype=PIECE)
        for name in BAND_FIELDS:
            part[name] = band[name]
        for name in ("q_token", "k_token", "pitch"):
            part[name] = piece[name]
        return int(_columns(part[0], matrix)[2].sum())
    return int(np.ceil(band_ops.area(band)[0] * _share(mask, int(piece["matrix"]))))


def _share(mask: "Mask", matrix: int) -> float:
    """Pairs that a run-time matrix lets through, over those of its bands."""
    index = np.flatnonzero(mask.matrix == matrix)
    whole = band_ops.area(mask.bands[index]).sum()
    return float(sum(block_row_areas(mask, int(i)).sum() for i in index) / max(whole, 1))


def key_runs(mask: "Mask", pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of key rows that tiles need: (tile, first row, last row + 1), by tile.

    One run per tile; one per block of keys where a known matrix leaves some out.
    """
    number = mask.matrix[pieces["band"]]
    known = np.array([m.allowed is not None for m in mask.matrices] + [False])
    restricted = np.flatnonzero((number >= 0) & known[number])
    whole = np.ones(len(pieces), dtype=bool)
    whole[restricted] = False
    index, first, last = [np.flatnonzero(whole)], [pieces["k0"][whole]], [pieces["k1"][whole]]
    for at in restricted:
        low, high, _ = _columns(pieces[at], mask.matrices[number[at]])
        index.append(np.full(len(low), at))
        first.append(low)
        last.append(high)
    return np.concatenate(index), np.concatenate(first), np.concatenate(last)

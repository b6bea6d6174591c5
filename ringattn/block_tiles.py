"""Tiles of masks with block matrices: which ones hold a pair, which keys they need, their areas."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import BAND, BAND_FIELDS, expand_ranges
from ringattn.blocks import block_row_areas, is_open
from ringattn.errors import UserError
from ringattn.kernels.block_matrix import BlockMatrix, spans
from ringattn.tiles import PIECE, intersect

if TYPE_CHECKING:
    from ringattn.mask import Mask

MAX_CELLS = 1 << 27
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # first row, last row + 1, allowed pairs


def see(mask: "Mask", q_segments: np.ndarray, k_segments: np.ndarray) -> np.ndarray:
    """All tiles of a mask over pairs of a query and a key segment of the same group.

    As `ringattn.tiles.intersect`; where a band has a known matrix, tiles without an allowed block
    are left out, and the others cropped to the keys that they need and counted exactly.
    """
    pieces = intersect(mask.bands, q_segments, k_segments)
    if not len(mask.matrices):
        return pieces
    number, restricted = mask.matrix[pieces["band"]], mask.is_restricted[pieces["band"]]
    keep = np.ones(len(pieces), dtype=bool)
    alike, single = _grouped(pieces, restricted)
    _refuse_too_many(pieces[single], [mask.matrices[n] for n in number[single]])
    for index in single:
        columns = _columns(pieces[index], mask.matrices[number[index]])
        keep[index] = _crop(pieces[index : index + 1], columns)
    for index in alike:
        keep[index] = _crop_together(pieces, index, mask.matrices[number[index[0]]])
    _estimate(mask, pieces, (number >= 0) & ~restricted)
    return pieces[keep]


def _grouped(pieces: np.ndarray, restricted: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Restricted tiles that share the allowed rows of each block of keys, together, and those that
    must be looked at one by one: with a diagonal edge or in stripes."""
    slow = restricted & (~is_open(pieces) | (pieces["pitch"] > 1))
    fast = np.flatnonzero(restricted & ~slow)
    keys = np.stack([pieces[n][fast] for n in ("qseg", "band", "q0", "q1")], axis=1)
    order = np.lexsort(keys.T[::-1])
    starts = np.flatnonzero(np.any(np.diff(keys[order], axis=0), axis=1)) + 1
    alike = [part for part in np.split(fast[order], starts) if len(part)]
    return alike, np.flatnonzero(slow)


def _refuse_too_many(pieces: np.ndarray, matrices: list[BlockMatrix]) -> None:
    """Raises UserError where tiles looked at one by one would be looked at for hours."""
    cells = 0.0
    for piece, matrix in zip(pieces, matrices, strict=True):
        rows, keys = (
            float(piece["pitch"] * (piece[a + "1"] - piece[a + "0"]) / np.diff(edges).mean())
            for a, edges in (("q", matrix.q_edges), ("k", matrix.k_edges))
        )
        cells += min(rows, len(matrix.q_edges)) * min(keys, len(matrix.k_edges))
    if cells > MAX_CELLS:
        raise UserError(
            f"{len(pieces):,} tiles over {cells:.2g} blocks of a matrix",
            f"at most {MAX_CELLS:,} blocks are looked at: stripes meet every block on every rank",
            "use a layout of longer ranges, such as contiguous or zigzag",
        )


def _allowed_rows(piece: Any, matrix: BlockMatrix) -> np.ndarray:
    """How many of a tile's query rows each block of keys allows, int64 (nk,)."""
    held = spans(matrix.q_edges, int(piece["q_token"]), 1, int(piece["q0"]), int(piece["q1"]))
    assert matrix.allowed is not None
    rows = np.array([s.last - s.first for s in held])
    return rows @ matrix.allowed[[s.block for s in held]]


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
    allowed = _allowed_rows(pieces[index[0]], matrix)
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


def _columns(piece: Any, matrix: BlockMatrix) -> Columns:
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
    number, restricted = mask.matrix[pieces["band"]], mask.is_restricted[pieces["band"]]
    whole = ~restricted
    runs = [(np.flatnonzero(whole), pieces["k0"][whole], pieces["k1"][whole])]
    alike, single = _grouped(pieces, restricted)
    for at in single:
        low, high, _ = _columns(pieces[at], mask.matrices[number[at]])
        runs.append((np.full(len(low), at), low, high))
    for index in alike:
        runs.append(_runs_together(pieces, index, mask.matrices[number[index[0]]]))
    index, first, last = (np.concatenate(column) for column in zip(*runs, strict=True))
    return index, first, last


def _runs_together(
    pieces: np.ndarray, index: np.ndarray, matrix: BlockMatrix
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of keys, (tile, first row, last row + 1), of open tiles with equal query rows."""
    blocks = np.flatnonzero(_allowed_rows(pieces[index[0]], matrix))
    fresh = np.concatenate([[True], np.diff(blocks) > 1])[: len(blocks)]
    begin = matrix.k_edges[blocks[fresh]]
    end = matrix.k_edges[blocks[np.concatenate([fresh[1:], [True]])[: len(blocks)]] + 1]
    token = pieces["k_token"][index]
    low, high = pieces["k0"][index] + token, pieces["k1"][index] + token
    first = np.searchsorted(end, low, side="right")
    which, run = expand_ranges(first, np.searchsorted(begin, high, side="left"))
    start = np.maximum(begin[run], low[which]) - token[which]
    return index[which], start, np.minimum(end[run], high[which]) - token[which]

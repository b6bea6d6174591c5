"""Block tiles of known matrices as band tiles: one per block of rows and run of allowed blocks."""

import numpy as np

from ringattn.kernels.block_matrix import BlockMatrix, BlockTiles, spans
from ringattn.kernels.tiles import TILE


def block_bands(blocks: BlockTiles | None) -> np.ndarray:
    """The tiles of known matrices as a tight, disjoint table of dtype `TILE`.

    Tiles of run-time matrices are left out: see `routed_tiles`.
    """
    none = np.empty(0, dtype=TILE)
    if blocks is None:
        return none
    parts = [_bands(tile, blocks.matrices[tile["matrix"]]) for tile in blocks.tiles]
    return np.concatenate([none, *parts])


def routed_tiles(blocks: BlockTiles | None) -> BlockTiles | None:
    """The tiles whose matrix is selected at run time, or None where there are none."""
    if blocks is None:
        return None
    routed = np.array([m.allowed is None for m in blocks.matrices], dtype=bool)
    mine = blocks.tiles[routed[blocks.tiles["matrix"]]]
    return BlockTiles(mine, blocks.matrices) if len(mine) else None


def _bands(tile: np.void, matrix: BlockMatrix) -> np.ndarray:
    if matrix.allowed is None:
        return np.empty(0, dtype=TILE)
    pitch = int(tile["pitch"])
    rows = spans(matrix.q_edges, int(tile["q_token"]), pitch, int(tile["q0"]), int(tile["q1"]))
    keys = spans(matrix.k_edges, int(tile["k_token"]), pitch, int(tile["k0"]), int(tile["k1"]))
    allowed = matrix.allowed[np.ix_([s.block for s in rows], [s.block for s in keys])]
    edge = np.zeros((len(rows), 1), dtype=bool)
    change = np.diff(np.hstack([edge, allowed, edge]).astype(np.int8), axis=1)
    row, begin = np.nonzero(change == 1)
    _, end = np.nonzero(change == -1)
    bands = np.empty(len(row), dtype=TILE)
    for name in ("h0", "h1", "lo", "hi"):
        bands[name] = tile[name]
    bands["step"] = 1
    bands["q0"], bands["q1"] = np.array([(s.first, s.last) for s in rows]).reshape(-1, 2)[row].T
    bands["k0"] = np.array([s.first for s in keys], dtype=np.int64)[begin]
    bands["k1"] = np.array([s.last for s in keys], dtype=np.int64)[end - 1]
    return _tight(bands)


def _tight(bands: np.ndarray) -> np.ndarray:
    """Bands of step 1 cropped to the rows and keys that they use; those of no pair left out."""
    q0 = np.maximum(bands["q0"], bands["k0"] - bands["hi"])
    q1 = np.minimum(bands["q1"], bands["k1"] - bands["lo"])
    k0 = np.maximum(bands["k0"], q0 + bands["lo"])
    k1 = np.minimum(bands["k1"], q1 + bands["hi"])
    for name, value in (("q0", q0), ("q1", q1), ("k0", k0), ("k1", k1)):
        bands[name] = value
    return bands[(q0 < q1) & (k0 < k1)]

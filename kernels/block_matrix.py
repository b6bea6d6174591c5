"""Block matrices: masks that allow or forbid whole blocks of (query, key) pairs.

A matrix cuts the sequence's query tokens and key tokens into blocks. Which pairs of blocks are
allowed is either known (`allowed`) or selected at run time (`Selection`). A block tile is a band
tile of which only the pairs of allowed blocks count; token of buffer row r is q + pitch * r.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ringattn.kernels.tiles import TILE

BLOCK_TILE = np.dtype(
    [
        *((name, np.int64) for name in TILE.names or ()),
        *((name, np.int64) for name in ("matrix", "head", "q_token", "k_token", "pitch")),
    ]
)


@dataclass(frozen=True, eq=False)
class BlockMatrix:
    """Blocks of query and key tokens, and which pairs of them are allowed.

    Attributes:
        q_edges, k_edges: first token of each block, and the number of tokens; increasing, int64
            (nq + 1,) and (nk + 1,).
        allowed: bool (nq, nk), or None where pairs are selected at run time.
    """

    q_edges: np.ndarray
    k_edges: np.ndarray
    allowed: np.ndarray | None


@dataclass(frozen=True)
class Selection:
    """Blocks selected at run time.

    Attributes:
        blocks: int32 (B, selecting heads, nq, most): the key blocks of each query block, each
            named once; -1 fills up.
        q_heads: query heads of the whole model; consecutive ones share a selecting head.
    """

    blocks: torch.Tensor
    q_heads: int

    def head(self, q_head: int) -> int:
        """The selecting head of a query head."""
        return q_head * self.blocks.shape[1] // self.q_heads


@dataclass(frozen=True, eq=False)
class BlockTiles:
    """Tiles of dtype `BLOCK_TILE`, of step 1, and the matrices that their column names.

    `matrix` is an index into `matrices`, `head` the model's query head of the tile's h0, `q_token`
    and `k_token` the tokens of buffer rows 0.
    """

    tiles: np.ndarray
    matrices: tuple[BlockMatrix, ...]


@dataclass(frozen=True)
class Span:
    """Buffer rows [first, last) that lie in one block."""

    first: int
    last: int
    block: int


def spans(edges: np.ndarray, token: int, pitch: int, first: int, last: int) -> list[Span]:
    """Cuts buffer rows [first, last) at block edges; row r holds token `token + pitch * r`."""
    cuts = np.clip(-((token - edges) // pitch), first, last)  # first row at or beyond each edge
    held = np.flatnonzero(cuts[1:] > cuts[:-1])
    return [Span(int(cuts[b]), int(cuts[b + 1]), int(b)) for b in held]


def allowed_pairs(tile: np.void, matrix: BlockMatrix) -> np.ndarray:
    """bool (rows, keys) of a block tile's rectangle; every block of a run-time matrix counts.

    For tests, proofs and pictures: O(rows * keys).
    """
    rows, keys = np.arange(tile["q0"], tile["q1"]), np.arange(tile["k0"], tile["k1"])
    distance = keys[None, :] - rows[:, None]
    inside = (distance >= tile["lo"]) & (distance <= tile["hi"])
    if matrix.allowed is None:
        return inside
    q_block = _block_of(matrix.q_edges, tile["q_token"] + tile["pitch"] * rows)
    k_block = _block_of(matrix.k_edges, tile["k_token"] + tile["pitch"] * keys)
    return inside & matrix.allowed[np.ix_(q_block, k_block)]


def _block_of(edges: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.searchsorted(edges, tokens, side="right") - 1

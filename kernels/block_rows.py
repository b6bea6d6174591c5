"""Block tiles as products of a few query rows and gathered key rows, for the matmul kernel."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ringattn.kernels.block_matrix import BlockTiles, Selection, Span, spans
from ringattn.kernels.heads import head_parts


@dataclass(frozen=True)
class Block:
    """Buffer rows of one product, and the mask (rows, keys) of it, None where all is allowed."""

    q: slice
    k: slice | torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class RowTile:
    """A block tile cut at block edges.

    h0, h1: query heads of the buffer; head: the model's head of h0. lo, hi: bounds on buffer rows.
    rows, keys: spans of both axes. allowed: bool (len(rows), len(keys)), None for a run-time one.
    """

    h0: int
    h1: int
    head: int
    lo: int
    hi: int
    rows: tuple[Span, ...]
    keys: tuple[Span, ...]
    allowed: np.ndarray | None


Part = tuple[slice, slice, slice, Block]


def row_tiles(blocks: BlockTiles | None) -> tuple[RowTile, ...]:
    """The tiles cut at the edges of their matrices' blocks."""
    return () if blocks is None else tuple(_row_tile(row, blocks) for row in blocks.tiles)


def _row_tile(row: np.void, blocks: BlockTiles) -> RowTile:
    matrix, pitch = blocks.matrices[row["matrix"]], int(row["pitch"])
    rows = spans(matrix.q_edges, int(row["q_token"]), pitch, int(row["q0"]), int(row["q1"]))
    keys = spans(matrix.k_edges, int(row["k_token"]), pitch, int(row["k0"]), int(row["k1"]))
    allowed = None
    if matrix.allowed is not None:
        allowed = matrix.allowed[np.ix_([s.block for s in rows], [s.block for s in keys])]
    h0, h1, head, lo, hi = (int(row[name]) for name in ("h0", "h1", "head", "lo", "hi"))
    return RowTile(h0, h1, head, lo, hi, tuple(rows), tuple(keys), allowed)


def block_parts(
    tile: RowTile, q: torch.Tensor, k: torch.Tensor, selection: Selection | None, most: int
) -> Iterator[Part]:
    """(batch, query heads, key heads, block) that together compute a tile; `most` scores each."""
    group = q.shape[2] // k.shape[2]
    if tile.allowed is not None:
        for heads, key_heads in head_parts(tile.h0, tile.h1, group):
            count = q.shape[0] * (heads.stop - heads.start)
            for span, allowed in zip(tile.rows, tile.allowed, strict=True):
                keys = [tile.keys[i] for i in np.flatnonzero(allowed)]
                for block in _products(tile, span, keys, most // max(count, 1), q.device):
                    yield slice(None), heads, key_heads, block
        return
    assert selection is not None, "a plan of run-time blocks runs with a selection"
    by_block = {span.block: span for span in tile.keys}
    for batch in range(q.shape[0]):
        for h0, h1, chosen in _selecting(tile, batch, selection):
            for span in tile.rows:
                keys = [by_block[b] for b in chosen[span.block] if b in by_block]
                for heads, key_heads in head_parts(h0, h1, group):
                    count = heads.stop - heads.start
                    for block in _products(tile, span, keys, most // count, q.device):
                        yield slice(batch, batch + 1), heads, key_heads, block


def _selecting(
    tile: RowTile, batch: int, selection: Selection
) -> Iterator[tuple[int, int, list[list[int]]]]:
    """Runs [h0, h1) of the tile's heads that share a selecting head, with its blocks per row."""
    first = tile.h0
    for h in range(tile.h0 + 1, tile.h1 + 1):
        own = selection.head(tile.head + first - tile.h0)
        if h == tile.h1 or selection.head(tile.head + h - tile.h0) != own:
            yield first, h, selection.blocks[batch, own].tolist()
            first = h


def _products(
    tile: RowTile, rows: Span, keys: list[Span], most: int, device: torch.device
) -> Iterator[Block]:
    """One query span against key spans, cropped to the tile's band, `most` scores at once."""
    index = _key_rows(keys)
    index = index[(index >= rows.first + tile.lo) & (index < rows.last + tile.hi)]
    at_once = max(1, most // (rows.last - rows.first))
    for start in range(0, len(index), at_once):
        part = index[start : start + at_once]
        mask = None
        if part[0] < rows.last - 1 + tile.lo or part[-1] > rows.first + tile.hi:
            distance = part[None, :] - np.arange(rows.first, rows.last)[:, None]
            mask = torch.from_numpy((distance >= tile.lo) & (distance <= tile.hi)).to(device)
        whole = int(part[-1] - part[0]) + 1 == len(part)
        k_rows = slice(int(part[0]), int(part[-1]) + 1) if whole else _index(part, device)
        yield Block(slice(rows.first, rows.last), k_rows, mask)


def _key_rows(keys: list[Span]) -> np.ndarray:
    """The rows of the spans, ascending."""
    first = np.sort(np.array([s.first for s in keys], dtype=np.int64))
    last = np.sort(np.array([s.last for s in keys], dtype=np.int64))
    count = last - first
    begin = np.cumsum(count) - count
    return np.repeat(first - begin, count) + np.arange(count.sum())


def _index(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(rows).to(device)

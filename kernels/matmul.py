"""Tiled-matmul attention: any device, dtype, mask, softcap and head dims, in bounded memory.

The fallback everywhere. Scores exist for one block of query rows and key rows at a time, at most
`SCORES` numbers over all batch rows and heads of a part; blocks outside the band are skipped and
only blocks that an edge of the band crosses are masked. Products are taken in the accumulator
dtype (float32, or float64 for float64 inputs). Key and value heads are never expanded: the query
heads of a group are stacked along the rows of one product.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ringattn.kernels.block_matrix import BlockTiles, Selection
from ringattn.kernels.block_rows import Block, Part, RowTile, block_parts, row_tiles
from ringattn.kernels.heads import head_parts
from ringattn.kernels.lattice import LatticeTile, lattice_tiles
from ringattn.kernels.merge import NO_KEY, accumulator_dtype, merge_partial

SCORES = 1 << 22
KEY_BLOCK = 1024
QUERY_BLOCK = 1024


@dataclass(frozen=True)
class PreparedTiles:
    """Band tiles on their own lattices, and block tiles cut at block edges."""

    bands: tuple[LatticeTile, ...]
    blocks: tuple[RowTile, ...]


def _blocks(tile: LatticeTile, rows_at_once: int, device: torch.device) -> Iterator[Block]:
    for a0 in range(0, tile.rows, rows_at_once):
        a1 = min(a0 + rows_at_once, tile.rows)
        first, last = max(0, a0 + tile.lo), min(tile.keys, a1 + tile.hi)
        for b0 in range(first, last, KEY_BLOCK):
            b1 = min(b0 + KEY_BLOCK, last)
            mask = None
            if b0 - (a1 - 1) < tile.lo or b1 - 1 - a0 > tile.hi:
                distance = torch.arange(b0, b1, device=device) - torch.arange(
                    a0, a1, device=device
                ).unsqueeze(-1)
                mask = (distance >= tile.lo) & (distance <= tile.hi)
            yield Block(_rows(tile.q0, a0, a1, tile.step), _rows(tile.k0, b0, b1, tile.step), mask)


def _rows(origin: int, start: int, stop: int, step: int) -> slice:
    return slice(origin + start * step, origin + (stop - 1) * step + 1, step)


def _stack(
    x: torch.Tensor, rows: slice | torch.Tensor, heads: slice, key_heads: int
) -> torch.Tensor:
    """(B, T, H, X) → (B, key heads, group * rows, X); group is 1 for keys and values."""
    x = x[:, rows, heads].transpose(1, 2)
    return x.reshape(x.shape[0], key_heads, -1, x.shape[-1])


def _unstack(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, key heads, group * rows, X) → (B, rows, H, X)."""
    return x.reshape(x.shape[0], heads, -1, x.shape[-1]).transpose(1, 2)


def _key_product(weight: torch.Tensor, x: torch.Tensor, heads: int) -> torch.Tensor:
    """weight' x for every query head, then summed over each group: (B, keys, key heads, X).

    One product over the stacked rows of a group would add up more numbers in one go, which costs
    float32 accuracy.
    """
    group = heads // weight.shape[1]
    weight, x = (t.unflatten(2, (group, -1)) for t in (weight, x))
    return (weight.transpose(-1, -2) @ x).sum(2).transpose(1, 2)


def _scores(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked scores (B, key heads, group * rows, keys), and tanh(score / softcap) for its slope."""
    score = (q @ k.transpose(-1, -2)).mul_(scale)
    squashed = None
    if softcap:
        squashed = score.div_(softcap).tanh_()
        score = squashed * softcap
    if mask is not None:
        grouped = score.view(*score.shape[:2], -1, *mask.shape)
        grouped.masked_fill_(~mask, NO_KEY)
    return score, squashed


def _parts(
    prepared: PreparedTiles, q: torch.Tensor, k: torch.Tensor, selection: Selection | None
) -> Iterator[Part]:
    """(batch, query heads, key heads, block) over all tiles."""
    group = q.shape[2] // k.shape[2]
    for tile in prepared.bands:
        for heads, key_heads in head_parts(tile.h0, tile.h1, group):
            count = q.shape[0] * (heads.stop - heads.start)
            rows_at_once = max(
                1, min(QUERY_BLOCK, SCORES // (max(count, 1) * min(KEY_BLOCK, tile.keys)))
            )
            for block in _blocks(tile, rows_at_once, q.device):
                yield slice(None), heads, key_heads, block
    for tile in prepared.blocks:
        yield from block_parts(tile, q, k, selection, SCORES)


class MatmulKernel:
    """See the module docstring. Implements `ringattn.kernels.base.Kernel`."""

    name = "matmul"
    reads_around = False

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Refuses only dtypes that are not floating point."""
        if not dtype.is_floating_point:
            return f"dtype {dtype} is not a floating-point dtype"
        return None

    def prepare(
        self, tiles: np.ndarray, device: torch.device, blocks: BlockTiles | None = None
    ) -> PreparedTiles:
        """The tiles on their own lattices, block tiles cut at block edges."""
        return PreparedTiles(lattice_tiles(tiles), row_tiles(blocks))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: PreparedTiles,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.forward`."""
        dtype = accumulator_dtype(q.dtype)
        for batch, heads, key_heads, block in _parts(prepared, q, k, selection):
            n_heads, n_key = heads.stop - heads.start, key_heads.stop - key_heads.start
            qb = _stack(q[batch], block.q, heads, n_key).to(dtype)
            kb = _stack(k[batch], block.k, key_heads, n_key).to(dtype)
            vb = _stack(v[batch], block.k, key_heads, n_key).to(dtype)
            score, _ = _scores(qb, kb, block.mask, scale, softcap)
            top = score.amax(-1, keepdim=True)
            top.masked_fill_(top == NO_KEY, 0.0)
            prob = score.sub_(top).exp_()
            total = prob.sum(-1, keepdim=True)
            part_out = (prob @ vb).div_(total.clamp_min(torch.finfo(dtype).tiny))
            part_lse = total.log_().add_(top)
            merge_partial(
                out[batch, block.q, heads],
                lse[batch, block.q, heads],
                _unstack(part_out, n_heads),
                _unstack(part_lse, n_heads).squeeze(-1),
            )

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        prepared: PreparedTiles,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.backward`."""
        dtype = accumulator_dtype(q.dtype)
        lse = lse.masked_fill(lse == NO_KEY, float("inf"))  # a row without keys: exp(x - inf) = 0
        for batch, heads, key_heads, block in _parts(prepared, q, k, selection):
            n_heads, n_key = heads.stop - heads.start, key_heads.stop - key_heads.start
            qb = _stack(q[batch], block.q, heads, n_key).to(dtype)
            gb = _stack(dout[batch], block.q, heads, n_key).to(dtype)
            kb = _stack(k[batch], block.k, key_heads, n_key).to(dtype)
            vb = _stack(v[batch], block.k, key_heads, n_key).to(dtype)
            row_lse = _stack(lse[batch].unsqueeze(-1), block.q, heads, n_key)
            row_delta = _stack(delta[batch].unsqueeze(-1), block.q, heads, n_key)
            score, squashed = _scores(qb, kb, block.mask, scale, softcap)
            prob = score.sub_(row_lse).exp_()
            dv[batch][:, block.k, key_heads] += _key_product(prob, gb, n_heads)
            dscore = (gb @ vb.transpose(-1, -2)).sub_(row_delta).mul_(prob).mul_(scale)
            if squashed is not None:
                dscore.mul_(1 - squashed.square())
            dq[batch, block.q, heads] += _unstack(dscore @ kb, n_heads)
            dk[batch][:, block.k, key_heads] += _key_product(dscore, qb, n_heads)

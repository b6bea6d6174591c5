"""Run-time selection of blocks: pooled queries score pooled keys, the best blocks are attended.

Every rank ends with the same selection, bit for bit, whatever the sharding: a block's rows are
added in one fixed order (a binary tree over its tokens), blocks that a shard cuts are put together
first, and scores are products of one fixed shape. Selection carries no gradient.
Source: mixture of block attention, MoBA (arXiv 2502.13189), with queries pooled as well.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ringattn import bands as band_ops
from ringattn.kernels.block_matrix import BlockMatrix
from ringattn.kernels.merge import accumulator_dtype
from ringattn.mask import Mask
from ringattn.tiles import cropped_bands

ROWS = 256  # query blocks scored at once, on every rank alike


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a block of queries may select. bool (nq, nk) each.

    allowed: blocks of keys with a pair in the mask. own: those that hold tokens of the query block.
    """

    allowed: torch.Tensor
    own: torch.Tensor


def run_time_matrix(mask: Mask) -> BlockMatrix:
    """The matrix of a routed mask."""
    assert mask.routing is not None
    return mask.matrices[0]


def candidates_of(mask: Mask, device: torch.device) -> Candidates:
    """The blocks that may be selected under a routed mask."""
    matrix = run_time_matrix(mask)
    nq, nk = len(matrix.q_edges) - 1, len(matrix.k_edges) - 1
    part, block = cropped_bands(mask.bands, matrix.q_edges[:-1], matrix.q_edges[1:])
    part, kept = band_ops.tighten(part)
    marks = np.zeros((nq, nk + 1), dtype=np.int16)
    low = np.searchsorted(matrix.k_edges, part["k0"], side="right") - 1
    high = np.searchsorted(matrix.k_edges, part["k1"], side="left")
    np.add.at(marks, (block[kept], low), 1)
    np.add.at(marks, (block[kept], high), -1)
    allowed = np.cumsum(marks, axis=1, dtype=np.int16)[:, :-1] > 0
    number = np.arange(nk)
    begin = np.searchsorted(matrix.k_edges, matrix.q_edges[:-1], side="right") - 1
    end = np.searchsorted(matrix.k_edges, matrix.q_edges[1:], side="left")
    own = allowed & (number >= begin[:, None]) & (number < end[:, None])
    return Candidates(torch.from_numpy(allowed).to(device), torch.from_numpy(own).to(device))


def selecting_heads(q: torch.Tensor, kv_heads: int, per_head: bool) -> torch.Tensor:
    """Queries in accumulator dtype, one per selecting head: (B, T, Hq or Hkv, D).

    Where the query heads of a key head select together, they are averaged, in head order.
    """
    wide = q.to(accumulator_dtype(q.dtype))
    if per_head or q.shape[2] == kv_heads:
        return wide
    grouped = wide.unflatten(2, (kv_heads, -1))
    total = grouped[:, :, :, 0].clone()
    for member in range(1, grouped.shape[3]):
        total += grouped[:, :, :, member]
    return total.div_(grouped.shape[3])


def average(rows: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Averages of blocks, added as a binary tree over the places in a block.

    Args:
        rows: (B, blocks, size, H, D) in accumulator dtype; changed.
        held: bool (blocks, size), False where a short block has no row.
    """
    rows.masked_fill_(~held[None, :, :, None, None], 0)
    width = rows.shape[2]
    while width > 1:
        half = -(-width // 2)
        rows[:, :, : width - half] += rows[:, :, half:width]
        width = half
    return rows[:, :, 0] / held.sum(1)[None, :, None, None]


def select(
    q_blocks: torch.Tensor, k_blocks: torch.Tensor, candidates: Candidates, top_k: int
) -> torch.Tensor:
    """The selected blocks of keys, int32 (B, selecting heads, nq, top_k), ascending, then -1.

    Args:
        q_blocks: (B, nq, selecting heads, D). k_blocks: (B, nk, Hkv, D), both averaged.
        candidates: blocks that may be selected. Their own blocks come first, then by score; ties
            go to the lower block.
    """
    keys = k_blocks.transpose(1, 2)
    keys = keys.repeat_interleave(q_blocks.shape[2] // keys.shape[1], dim=1).transpose(-1, -2)
    nk = keys.shape[-1]
    chosen = []
    for start in range(0, q_blocks.shape[1], ROWS):
        part = q_blocks[:, start : start + ROWS].transpose(1, 2)
        count = part.shape[2]
        padded = torch.nn.functional.pad(part, (0, 0, 0, ROWS - count)).contiguous()
        score = (padded @ keys)[:, :, :count]
        score.masked_fill_(~candidates.allowed[start : start + count], -torch.inf)
        score.masked_fill_(candidates.own[start : start + count], torch.inf)
        value, index = score.sort(dim=-1, descending=True, stable=True)
        value, index = value[..., :top_k], index[..., :top_k]
        index = index.masked_fill(value == -torch.inf, nk).sort(dim=-1).values
        chosen.append(index.masked_fill(index == nk, -1).to(torch.int32))
    return torch.cat(chosen, dim=2)


def selection_shape(mask: Mask, q_heads: int, kv_heads: int) -> tuple[int, int, int]:
    """(selecting heads, nq, top_k) of a routed mask's selection."""
    routing = mask.routing
    assert routing is not None
    return q_heads if routing.per_head else kv_heads, routing.q_blocks, routing.top_k


def select_whole(q: torch.Tensor, k: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The selection of a routed mask from whole tensors; see `select`.

    Args:
        q: (B, S, Hq, D). k: (B, S, Hkv, D).
    """
    assert mask.routing is not None
    matrix, per_head = run_time_matrix(mask), mask.routing.per_head
    heads = selecting_heads(q.detach(), k.shape[2], per_head)
    keys = k.detach().to(accumulator_dtype(k.dtype))

    def averaged(x: torch.Tensor, edges: np.ndarray) -> torch.Tensor:
        tokens, held = (torch.from_numpy(t).to(q.device) for t in block_places(edges))
        return average(x[:, tokens], held)

    q_blocks, k_blocks = averaged(heads, matrix.q_edges), averaged(keys, matrix.k_edges)
    return select(q_blocks, k_blocks, candidates_of(mask, q.device), mask.routing.top_k)


def block_places(
    edges: np.ndarray, chosen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the places of blocks (of all, or the chosen ones), int64 (blocks, size), and which
    places are held, bool; others name the block's first token."""
    first, last = (edges[:-1], edges[1:]) if chosen is None else (edges[chosen], edges[chosen + 1])
    tokens = first[:, None] + np.arange(int(np.diff(edges).max()))
    held = tokens < last[:, None]
    return np.where(held, tokens, first[:, None]), held


def selected_layers(mask: Mask, selection: torch.Tensor, q_heads: int) -> torch.Tensor:
    """The allowed pairs of one batch element, bool (Hq, S, S); for references.

    Args:
        selection: int32 (selecting heads, nq, top_k).
    """
    matrix, heads = run_time_matrix(mask), selection.shape[0]
    nq, nk = len(matrix.q_edges) - 1, len(matrix.k_edges) - 1
    chosen = torch.zeros(heads, nq, nk + 1, dtype=torch.bool)
    chosen.scatter_(2, selection.cpu().long() % (nk + 1), True)  # -1 falls on the spare column
    rows = torch.from_numpy(np.repeat(np.arange(nq), np.diff(matrix.q_edges)))
    keys = torch.from_numpy(np.repeat(np.arange(nk), np.diff(matrix.k_edges)))
    pairs = chosen[:, rows][:, :, keys] & torch.from_numpy(mask.dense())
    return pairs.repeat_interleave(q_heads // heads, dim=0)

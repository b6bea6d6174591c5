"""Selection from sharded tensors: averaged blocks travel, rows only of blocks that a shard cuts."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ringattn.errors import CommunicationError
from ringattn.kernels.merge import accumulator_dtype
from ringattn.layout import Layout
from ringattn.mask import Mask
from ringattn.routing import (
    Candidates,
    average,
    block_places,
    candidates_of,
    run_time_matrix,
    select,
    selecting_heads,
)


@dataclass(frozen=True, eq=False)
class Pooling:
    """Where a rank's rows go for averaging blocks; all tensors int64 but the masks.

    Attributes:
        whole, whole_held: rows of the blocks that this rank holds entirely, (blocks, size).
        loose: this rank's rows of other blocks.
        sent: most items (averages and rows) that any rank sends.
        average_item, average_block: where averages lie among all items, and of which blocks.
        cut, cut_held, cut_block: items that are rows of each cut block, (blocks, size).
        blocks: how many there are.
    """

    whole: torch.Tensor
    whole_held: torch.Tensor
    loose: torch.Tensor
    sent: int
    average_item: torch.Tensor
    average_block: torch.Tensor
    cut: torch.Tensor
    cut_held: torch.Tensor
    cut_block: torch.Tensor
    blocks: int


def pooling_of(layout: Layout, edges: np.ndarray, rank: int, device: torch.device) -> Pooling:
    """The tables of a rank for blocks with these edges; pure host work."""
    blocks = len(edges) - 1
    rank_of = np.empty(layout.seq_len, dtype=np.int64)
    row_of = np.empty(layout.seq_len, dtype=np.int64)
    for r in range(layout.world):
        tokens = layout.positions(r)
        rank_of[tokens], row_of[tokens] = r, np.arange(len(tokens))
    first = rank_of[edges[:-1]]
    one_rank = np.minimum.reduceat(rank_of, edges[:-1]) == np.maximum.reduceat(rank_of, edges[:-1])
    block_of = np.repeat(np.arange(blocks), np.diff(edges))
    loose = ~one_rank[block_of]
    averages = [np.flatnonzero(one_rank & (first == r)) for r in range(layout.world)]
    rows = [np.flatnonzero(loose & (rank_of == r)) for r in range(layout.world)]
    sent = max(len(a) + len(b) for a, b in zip(averages, rows, strict=True))
    item = np.full(layout.seq_len, -1, dtype=np.int64)  # place of a loose token among all items
    for r, tokens in enumerate(rows):
        item[tokens] = r * sent + len(averages[r]) + np.arange(len(tokens))
    cut_block = np.flatnonzero(~one_rank)

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    whole, whole_held = block_places(edges, averages[rank])
    cut, cut_held = block_places(edges, cut_block)
    at = [r * sent + np.arange(len(a)) for r, a in enumerate(averages)]
    return Pooling(
        whole=tensor(row_of[whole]),
        whole_held=tensor(whole_held),
        loose=tensor(row_of[rows[rank]]),
        sent=sent,
        average_item=tensor(np.concatenate(at)),
        average_block=tensor(np.concatenate(averages)),
        cut=tensor(item[cut]),
        cut_held=tensor(cut_held),
        cut_block=tensor(cut_block),
        blocks=blocks,
    )


def pooled(x: torch.Tensor, tables: Pooling, group: dist.ProcessGroup) -> torch.Tensor:
    """Averages of all blocks, (B, blocks, H, D), on every rank. All ranks communicate.

    Args:
        x: (B, T, H, D), this rank's rows in accumulator dtype.
    """
    mine = torch.cat([average(x[:, tables.whole], tables.whole_held), x[:, tables.loose]], dim=1)
    items = x.new_zeros((x.shape[0], tables.sent, *x.shape[2:]))
    items[:, : mine.shape[1]] = mine
    parts = [torch.empty_like(items) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, items, group=group)
    everything = torch.cat(parts, dim=1)
    out = x.new_empty((x.shape[0], tables.blocks, *x.shape[2:]))
    out[:, tables.average_block] = everything[:, tables.average_item]
    out[:, tables.cut_block] = average(everything[:, tables.cut], tables.cut_held)
    return out


@dataclass(frozen=True, eq=False)
class Router:
    """Selects the blocks of a routed mask from the shards of a group.

    Tables are on one device; nothing waits for the host.
    """

    mask: Mask
    q_pooling: Pooling
    k_pooling: Pooling
    candidates: Candidates

    @classmethod
    def of(cls, mask: Mask, layout: Layout, rank: int, device: torch.device) -> "Router":
        """The tables of a rank. Pure host work."""
        matrix = run_time_matrix(mask)
        q_pooling = pooling_of(layout, matrix.q_edges, rank, device)
        k_pooling = pooling_of(layout, matrix.k_edges, rank, device)
        return cls(mask, q_pooling, k_pooling, candidates_of(mask, device))

    @torch.no_grad()
    def select(self, q: torch.Tensor, k: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """The selection, equal on all ranks; see `ringattn.routing.select`. All ranks communicate.

        Args:
            q: (B, T, Hq, D). k: (B, T, Hkv, D), this rank's rows.
        """
        routing = self.mask.routing
        assert routing is not None
        heads = selecting_heads(q, k.shape[2], routing.per_head)
        try:
            q_blocks = pooled(heads, self.q_pooling, group)
            k_blocks = pooled(k.to(accumulator_dtype(k.dtype)), self.k_pooling, group)
        except RuntimeError as error:
            raise CommunicationError(
                f"rank {dist.get_rank(group)}: selecting blocks before step 0: "
                f"gathering averaged blocks did not complete: {error}"
            ) from error
        return select(q_blocks, k_blocks, self.candidates, routing.top_k)

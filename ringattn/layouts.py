"""Layouts by name: ways to share a sequence between ranks."""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from ringattn.errors import UserError
from ringattn.layout import Layout, from_ranges
from ringattn.masks import Mask
from ringattn.node_layouts import hybrid, node_balanced

__all__ = [
    "NAMES",
    "Layout",
    "area_greedy",
    "by_name",
    "contiguous",
    "from_ranges",
    "hybrid",
    "node_balanced",
    "striped",
    "zigzag",
]

NAMES = ("contiguous", "zigzag", "striped", "area_greedy", "node_balanced", "hybrid")


def _check_world(world: int) -> None:
    if world < 1:
        raise UserError(f"world={world}", "must be at least one rank", "pass world >= 1")


def _shares(total: int, parts: int) -> np.ndarray:
    """Cut points of `total` into near-equal parts, (parts + 1,)."""
    return np.arange(parts + 1, dtype=np.int64) * total // parts


def contiguous(seq_len: int, world: int, sizes: Sequence[int] | None = None) -> Layout:
    """Rank r owns the r-th run of consecutive tokens; `sizes` gives uneven runs (zero allowed)."""
    _check_world(world)
    if sizes is None:
        cuts = _shares(seq_len, world)
    else:
        if len(sizes) != world or sum(sizes) != seq_len or min(sizes) < 0:
            raise UserError(
                f"sizes={list(sizes)}",
                f"must be {world} non-negative counts that sum to {seq_len}",
                "give one token count per rank",
            )
        cuts = np.concatenate([[0], np.cumsum(sizes)])
    one = np.ones(world, dtype=np.int64)
    rows = np.stack([cuts[:-1], cuts[1:], one, np.arange(world)], axis=1)
    return from_ranges(seq_len, world, rows, "contiguous")


def zigzag(seq_len: int, world: int) -> Layout:
    """2P near-equal chunks; rank r owns chunks r and 2P-1-r, so causal work is balanced.

    Source: zigzag ring attention (zhuzilin/ring-flash-attention), context parallelism of Llama 3
    (arXiv 2407.21783, section 3.3.2).
    """
    _check_world(world)
    cuts = _shares(seq_len, 2 * world)
    chunk = np.stack([np.arange(world), 2 * world - 1 - np.arange(world)], axis=1).ravel()
    rank = np.repeat(np.arange(world), 2)
    rows = np.stack([cuts[chunk], cuts[chunk + 1], np.ones_like(rank), rank], axis=1)
    return from_ranges(seq_len, world, rows, "zigzag")


def striped(seq_len: int, world: int, stride: int = 1) -> Layout:
    """Tokens dealt round-robin in runs of `stride`; stride 1 gives rank r tokens r, r + P, ...

    Source: Striped Attention (arXiv 2311.09431).
    """
    _check_world(world)
    if stride < 1:
        raise UserError(f"stride={stride}", "must be >= 1", "deal at least one token at a time")
    if stride == 1:
        r = np.arange(world)
        stop = np.full(world, seq_len)
        rows = np.stack([np.minimum(r, seq_len), stop, np.full(world, world), r], axis=1)
    else:
        start = np.arange(0, seq_len, stride)
        rank = np.arange(len(start)) % world
        stop = np.minimum(start + stride, seq_len)
        rows = np.stack([start, stop, np.ones_like(start), rank], axis=1)
    return from_ranges(seq_len, world, rows, "striped")


def area_greedy(mask: Mask, world: int, chunk: int | None = None) -> Layout:
    """Chunks of consecutive tokens, largest mask area first, each to the least loaded rank.

    Every rank gets the same number of chunks (+-1), so that the rest of the model stays balanced.
    Source: MagiAttention's dispatch solver (min-heap greedy on mask area).

    Args:
        mask: its area per chunk is what is balanced.
        world: P.
        chunk: tokens per chunk; default about 8 chunks per rank, a multiple of 128 where it can be.
    """
    _check_world(world)
    seq_len = mask.seq_len
    if chunk is None:
        chunk = max(1, seq_len // (8 * world))
        chunk = chunk // 128 * 128 if chunk >= 128 else chunk
    if chunk < 1:
        raise UserError(f"chunk={chunk}", "must be >= 1", "pass tokens per chunk")
    start = np.arange(0, seq_len, chunk)
    stop = np.minimum(start + chunk, seq_len)
    areas = mask.row_area(start, stop)
    capacity = -(-len(start) // world)
    owner = np.empty(len(start), dtype=np.int64)
    heap = [(0, 0, rank) for rank in range(world)]
    for index in np.argsort(-areas, kind="stable"):
        load, held, rank = heapq.heappop(heap)
        owner[index] = rank
        if held + 1 < capacity:
            heapq.heappush(heap, (load + int(areas[index]), held + 1, rank))
    rows = np.stack([start, stop, np.ones_like(start), owner], axis=1)
    return from_ranges(seq_len, world, rows, "area_greedy")


OPTIONS = {
    "striped": ("stride",),
    "area_greedy": ("chunk",),
    "node_balanced": ("chunk", "group", "max_imbalance"),
    "hybrid": ("chunk", "group", "max_imbalance"),
}  # settings of a layout


def by_name(
    name: str, mask: Mask, world: int, ranks_per_node: int | None = None, **options: Any
) -> Layout:
    """The layout of that name for this mask, with its default options unless given.

    Without `ranks_per_node` all ranks are taken to share one node.
    """
    seq_len, local = mask.seq_len, ranks_per_node or world
    builders = {
        "contiguous": lambda: contiguous(seq_len, world),
        "zigzag": lambda: zigzag(seq_len, world),
        "striped": lambda: striped(seq_len, world, **options),
        "area_greedy": lambda: area_greedy(mask, world, **options),
        "node_balanced": lambda: node_balanced(mask, world, local, **options),
        "hybrid": lambda: hybrid(mask, world, local, **options),
    }
    if name not in builders:
        known = ", ".join(NAMES)
        raise UserError(f"layout={name!r}", f"must be one of {known}, auto", "pick one")
    known = OPTIONS.get(name, ())
    if strange := [key for key in options if key not in known]:
        raise UserError(
            f"layout_options={options!r}",
            f"layout {name!r} has {'the options ' + ', '.join(known) if known else 'none'}",
            f"drop {strange[0]!r} or choose another layout",
        )
    return builders[name]()

"""Layouts: which rank owns which tokens, and where each token sits in its rank's shard."""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn import bands as band_ops
from ringattn.errors import UserError
from ringattn.masks import Mask
from ringattn.tiles import SEGMENT, cropped_area

NAMES = ("contiguous", "zigzag", "striped", "area_greedy")


@dataclass(frozen=True, eq=False)
class Layout:
    """A partition of S tokens over P ranks into ranges of one common stride.

    Attributes:
        seq_len: S.
        world: P.
        name: the builder's name, for people.
        ranges: table of dtype `ringattn.tiles.SEGMENT`, sorted by rank and offset. A range holds
            tokens start, start + step, ... < stop at rows offset, offset + 1, ... of rank `owner`.
    """

    seq_len: int
    world: int
    name: str
    ranges: np.ndarray

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of each rank, int64 (P,)."""
        return np.bincount(
            self.ranges["owner"], weights=_counts(self.ranges), minlength=self.world
        ).astype(np.int64)

    @cached_property
    def key(self) -> str:
        """A digest of the partition."""
        digest = hashlib.sha256(np.array([self.seq_len, self.world]).tobytes())
        digest.update(np.ascontiguousarray(self.ranges).tobytes())
        return digest.hexdigest()

    def positions(self, rank: int) -> np.ndarray:
        """Global token ids of a rank's rows, in row order; int64 (tokens of the rank,)."""
        mine = self.ranges[self.ranges["owner"] == rank]
        parts = [np.arange(r["start"], r["stop"], r["step"]) for r in mine]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def order(self) -> np.ndarray:
        """Global token ids in shard order, rank after rank; int64 (S,)."""
        return np.concatenate([self.positions(rank) for rank in range(self.world)])


def _counts(ranges: np.ndarray) -> np.ndarray:
    return band_ops.ceil_div(ranges["stop"] - ranges["start"], ranges["step"])


def from_ranges(seq_len: int, world: int, rows, name: str = "ranges") -> Layout:
    """A layout from (start, stop, step, rank) rows; each rank's rows follow in the given order.

    Raises:
        UserError: a range leaves [0, S), steps differ, or not every token is held once.
    """
    values = np.asarray(rows, dtype=np.int64).reshape(-1, 4)
    start, stop, step, rank = values.T
    if (
        (start < 0).any() or (stop > seq_len).any() or (step < 1).any()
        or (rank < 0).any() or (rank >= world).any()
    ):  # fmt: skip
        raise UserError(
            f"layout {name}",
            f"ranges must lie in [0, {seq_len}) with step >= 1 and rank in [0, {world})",
            "crop the ranges",
        )
    if len(np.unique(step)) > 1:
        raise UserError(
            f"layout {name} with steps {np.unique(step).tolist()}",
            "all ranges of a layout share one step",
            "split the ranges to one common step",
        )
    table = np.zeros(len(values), dtype=SEGMENT)
    table["start"], table["step"], table["owner"] = start, step, rank
    count = band_ops.ceil_div(stop - start, step)
    table["stop"] = start + np.maximum(count, 0) * step
    table = table[count > 0]
    table = _join(table[np.argsort(table["owner"], kind="stable")])
    count = _counts(table)
    ends = np.cumsum(count)
    first_of_rank = np.searchsorted(table["owner"], table["owner"], side="left")
    table["offset"] = ends - count - (ends - count)[first_of_rank] if len(table) else 0
    table.setflags(write=False)
    if not _covers(table, seq_len):
        raise UserError(
            f"layout {name}", f"must hold each of {seq_len} tokens exactly once", "fix the ranges"
        )
    return Layout(int(seq_len), int(world), name, table)


def _covers(table: np.ndarray, seq_len: int) -> bool:
    """Whether the ranges (of one step) hold each token of [0, seq_len) exactly once."""
    if seq_len == 0 or not len(table):
        return seq_len == 0 and not len(table)
    step = int(table["step"][0])
    residue = table["start"] % step
    ordered = table[np.lexsort((table["start"], residue))]
    residue = ordered["start"] % step
    fresh = np.concatenate([[True], residue[1:] != residue[:-1]])
    due = np.where(fresh, residue, np.concatenate([[0], ordered["stop"][:-1]]))
    last = np.concatenate([fresh[1:], [True]])
    ends = ordered["stop"][last]
    return (
        bool((ordered["start"] == due).all())
        and bool((ends >= seq_len).all() and (ends < seq_len + step).all())
        and int(fresh.sum()) == min(step, seq_len)
    )


def _join(table: np.ndarray) -> np.ndarray:
    """Joins neighbouring ranges of a rank that continue each other: fewer, longer tiles."""
    if len(table) < 2:
        return table
    a, b = table[:-1], table[1:]
    breaks = (a["owner"] != b["owner"]) | (a["stop"] != b["start"])
    first = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    joined = table[first]
    joined["stop"] = table["stop"][np.concatenate([first[1:] - 1, [len(table) - 1]])]
    return joined


def _shares(total: int, parts: int) -> np.ndarray:
    """Cut points of `total` into near-equal parts, (parts + 1,)."""
    return np.arange(parts + 1, dtype=np.int64) * total // parts


def contiguous(seq_len: int, world: int, sizes: Sequence[int] | None = None) -> Layout:
    """Rank r owns the r-th run of consecutive tokens; `sizes` gives uneven runs (zero allowed)."""
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
    rows = np.stack([cuts[:-1], cuts[1:], np.ones(world), np.arange(world)], axis=1)
    return from_ranges(seq_len, world, rows, "contiguous")


def zigzag(seq_len: int, world: int) -> Layout:
    """2P near-equal chunks; rank r owns chunks r and 2P-1-r, so causal work is balanced.

    Source: zigzag ring attention (zhuzilin/ring-flash-attention), context parallelism of Llama 3
    (arXiv 2407.21783, section 3.3.2).
    """
    cuts = _shares(seq_len, 2 * world)
    chunk = np.stack([np.arange(world), 2 * world - 1 - np.arange(world)], axis=1).ravel()
    rank = np.repeat(np.arange(world), 2)
    rows = np.stack([cuts[chunk], cuts[chunk + 1], np.ones(2 * world), rank], axis=1)
    return from_ranges(seq_len, world, rows, "zigzag")


def striped(seq_len: int, world: int, stride: int = 1) -> Layout:
    """Tokens dealt round-robin in runs of `stride`; stride 1 gives rank r tokens r, r + P, ...

    Source: Striped Attention (arXiv 2311.09431).
    """
    if stride < 1:
        raise UserError(f"stride={stride}", "must be >= 1", "deal at least one token at a time")
    if stride == 1:
        r = np.arange(world)
        rows = np.stack([r, np.maximum(r, seq_len), np.full(world, world), r], axis=1)
        rows[:, 0] = np.minimum(rows[:, 0], seq_len)
        rows[:, 1] = seq_len
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
    seq_len = mask.seq_len
    if chunk is None:
        chunk = max(1, seq_len // (8 * world))
        chunk = chunk // 128 * 128 if chunk >= 128 else chunk
    if chunk < 1:
        raise UserError(f"chunk={chunk}", "must be >= 1", "pass tokens per chunk")
    start = np.arange(0, seq_len, chunk)
    stop = np.minimum(start + chunk, seq_len)
    areas = cropped_area(mask.bands, start, stop)
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


def by_name(name: str, mask: Mask, world: int) -> Layout:
    """The layout of that name for this mask, with its default options."""
    if name == "contiguous":
        return contiguous(mask.seq_len, world)
    if name == "zigzag":
        return zigzag(mask.seq_len, world)
    if name == "striped":
        return striped(mask.seq_len, world)
    if name == "area_greedy":
        return area_greedy(mask, world)
    raise UserError(f"layout={name!r}", f"must be one of {', '.join(NAMES)}, auto", "pick one")

"""A layout: which rank owns which tokens, and where each token sits in its rank's shard."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import integer_rows
from ringattn.errors import UserError
from ringattn.tiles import SEGMENT


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
    values = integer_rows(rows, 4, "(start, stop, step, rank)")
    if world < 1 or seq_len < 0:
        raise UserError(
            f"layout {name} of {seq_len} tokens over {world} ranks",
            "needs at least one rank and no negative length",
            "pass world >= 1",
        )
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
    table = join(table[np.argsort(table["owner"], kind="stable")])
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


def join(table: np.ndarray) -> np.ndarray:
    """Joins neighbouring ranges of an owner that continue each other: fewer, longer tiles."""
    if len(table) < 2:
        return table
    a, b = table[:-1], table[1:]
    breaks = (a["group"] != b["group"]) | (a["owner"] != b["owner"]) | (a["stop"] != b["start"])
    first = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    joined = table[first]
    joined["stop"] = table["stop"][np.concatenate([first[1:] - 1, [len(table) - 1]])]
    return joined

"""`Mask`: which query may attend which key, as bands, per group of heads, with block matrices."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import BAND
from ringattn.blocks import dense_group, restricted_area, row_area
from ringattn.errors import UserError
from ringattn.kernels.block_matrix import BlockMatrix
from ringattn.tiles import crop_queries

NO_MATRIX = -1
ANY = 0  # query heads of a head group: an equal share of however many there are


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How blocks are selected at run time; see `ringattn.routing`.

    Attributes:
        q_blocks, k_blocks: blocks of queries and of keys.
        top_k: most key blocks per query block, at most k_blocks.
        per_head: every query head selects for itself; otherwise the query heads of a key head
            select together.
    """

    q_blocks: int
    k_blocks: int
    top_k: int
    per_head: bool


@dataclass(frozen=True, eq=False)
class Mask:
    """Which query may attend which key.

    Attributes:
        seq_len: S, the number of tokens.
        bands: table of dtype `ringattn.bands.BAND`; tight, and disjoint within a head group.
        name: the builder's name, for people.
        heads: query heads of each head group, in order; `ANY` for equal shares of all heads.
        group: head group of each band, int64 (bands,).
        matrices: block matrices; matrix: the one that each band is restricted by, int64 (bands,),
            `NO_MATRIX` for none. A band of a matrix has step 1.
        routing: how matrices without known blocks get theirs, or None.
    """

    seq_len: int
    bands: np.ndarray
    name: str
    heads: tuple[int, ...] = (ANY,)
    group: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    matrices: tuple[BlockMatrix, ...] = ()
    matrix: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    routing: Routing | None = None

    def __post_init__(self) -> None:
        for name, default in (("group", 0), ("matrix", NO_MATRIX)):
            if getattr(self, name) is None:
                column = np.full(len(self.bands), default, dtype=np.int64)
                object.__setattr__(self, name, column)

    @cached_property
    def area(self) -> int:
        """Allowed (query, key) pairs, exact: the number of True in `dense()`.

        Of blocks that are selected at run time, as many as a full selection allows.
        """
        areas = restricted_area(self)
        return int(sum(int(a) * self.copies(int(g)) for g, a in zip(self.group, areas)))

    @cached_property
    def is_restricted(self) -> np.ndarray:
        """Whether each band is restricted by a matrix of known blocks, bool (bands,)."""
        known = np.array([m.allowed is not None for m in self.matrices] + [False])
        return known[self.matrix]  # NO_MATRIX falls on the last

    def copies(self, group: int) -> int:
        """Layers of `dense()` that show a head group."""
        return max(self.heads[group], 1)

    @property
    def layers(self) -> int:
        """Layers of `dense()`, which `area` counts."""
        return sum(self.copies(group) for group in range(len(self.heads)))

    @cached_property
    def key(self) -> str:
        """A digest of the allowed pairs' description: equal masks built alike have equal keys."""
        digest = hashlib.sha256(np.int64(self.seq_len).tobytes())
        digest.update(np.ascontiguousarray(self.bands).tobytes())
        if self.heads != (ANY,) or self.matrices:
            digest.update(repr((self.heads, self.routing)).encode())
            digest.update(self.group.tobytes() + self.matrix.tobytes())
        for m in self.matrices:
            digest.update(m.q_edges.tobytes() + m.k_edges.tobytes())
            if m.allowed is not None:
                digest.update(np.packbits(m.allowed).tobytes())
        return digest.hexdigest()

    def dense(self) -> np.ndarray:
        """Bool (S, S), True where query row may attend key column. For tests and pictures.

        (heads, S, S) where head groups differ: one layer per query head, or per group where the
        groups share the heads equally. Every block that may be selected at run time counts.
        """
        layers = [dense_group(self, group) for group in range(len(self.heads))]
        if len(layers) == 1:
            return layers[0]
        return np.repeat(np.stack(layers), [self.copies(g) for g in range(len(layers))], axis=0)

    def head_counts(self, q_heads: int) -> np.ndarray:
        """Query heads of each group, int64 (groups,).

        Raises:
            UserError: the groups do not make up `q_heads` query heads.
        """
        if ANY not in self.heads and sum(self.heads) == q_heads:
            return np.array(self.heads, dtype=np.int64)
        if set(self.heads) == {ANY} and q_heads % len(self.heads) == 0:
            return np.full(len(self.heads), q_heads // len(self.heads), dtype=np.int64)
        groups = len(self.heads) if ANY in self.heads else list(self.heads)
        raise UserError(
            f"mask {self.name} with head groups {groups} for {q_heads} query heads",
            "its groups must make up the query heads",
            "give head counts that sum to the model's, or a number of groups that divides them",
        )

    def band_heads(self, q_heads: int) -> tuple[np.ndarray, np.ndarray]:
        """First and last + 1 query head of each band."""
        counts = self.head_counts(q_heads)
        end = np.cumsum(counts)
        return (end - counts)[self.group], end[self.group]

    def for_heads(self, q_heads: int, first: int, last: int) -> "Mask":
        """The mask of query heads [first, last) of `q_heads`, with those heads alone."""
        counts = self.head_counts(q_heads)
        end = np.cumsum(counts)
        held = np.minimum(end, last) - np.maximum(end - counts, first)
        groups = np.flatnonzero(held > 0)
        keep = np.isin(self.group, groups)
        return Mask(
            self.seq_len,
            self.bands[keep],
            self.name,
            (ANY,) if len(groups) == 1 else tuple(int(n) for n in held[groups]),
            np.searchsorted(groups, self.group[keep]),
            self.matrices,
            self.matrix[keep],
            self.routing,
        )

    def restrict_queries(self, ranges: np.ndarray) -> "Mask":
        """The same mask for the queries of some ranges; the others attend nothing. Exact.

        Args:
            ranges: int64 (n, 2), rows [start, stop), sorted and disjoint; n may be 0.

        Raises:
            UserError: of blocks that are selected at run time, which are selected for all queries.
        """
        if self.routing is not None:
            raise UserError(
                f"mask {self.name} of some queries",
                "blocks that are selected at run time are selected for all queries",
                "keep the whole mask",
            )
        start, stop = np.asarray(ranges, dtype=np.int64).reshape(-1, 2).T
        part, origin, _ = crop_queries(self.bands, start, stop)
        tight, kept = band_ops.tighten(part)
        tight.setflags(write=False)
        origin = origin[kept]
        return Mask(
            self.seq_len,
            tight,
            f"{self.name} of some queries",
            self.heads,
            self.group[origin],
            self.matrices,
            self.matrix[origin],
        )

    @property
    def is_uniform(self) -> bool:
        """Whether all heads attend alike."""
        return len(self.heads) == 1

    def row_area(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Allowed pairs of the query rows of each range [start, stop), over `dense()`'s layers.

        Ranges are sorted and disjoint. Exact for bands; a matrix counts by its share of allowed
        pairs in the range's blocks. int64 (ranges,).
        """
        return row_area(self, start, stop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        groups = f", head_groups={len(self.heads)}" if not self.is_uniform else ""
        return f"Mask({self.name}, seq_len={self.seq_len}, bands={len(self.bands)}{groups})"


def positive(**values: int) -> None:
    """Raises UserError for a value that is not a positive integer."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name}={value!r}", "must be a positive integer", f"pass {name} >= 1")


def make_mask(seq_len: int, tables: Sequence[np.ndarray], name: str) -> Mask:
    """A mask of bands that are disjoint by construction."""
    table = np.concatenate(tables) if tables else np.empty(0, dtype=BAND)
    tight, _ = band_ops.tighten(table)
    tight.setflags(write=False)
    return Mask(seq_len, tight, name)

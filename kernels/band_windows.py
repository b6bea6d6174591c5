"""Tiles as windowed sequences: what a variable-length flash attention call computes.

A sequence of `rows` query rows and `keys` key rows with window (left, right), aligned bottom-right,
lets row a attend key b iff

    a + keys - rows - left <= b <= a + keys - rows + right,      left, right >= 0 or -1 for open

(Dao-AILab/flash-attention, csrc/flash_attn/src/mask.h, `apply_mask_local`). A tile on its lattice
is such a sequence with left = keys - rows - lo and right = hi - (keys - rows), and where it is
tight neither is negative: its last row attends some key b <= keys - 1, so lo <= keys - rows; its
last key is attended by some row a <= rows - 1, so hi >= keys - rows. Tiles are made tight first.

An edge that cuts nothing (lo <= 1 - rows, hi >= keys - 1) fits any window from some width on, which
is how a short document shares a call with long ones that the window does cut.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from ringattn.kernels.lattice import LatticeTile, lattice_tiles

OPEN_WINDOW = -1
RECENT = 32
"""Open calls that a tile is tried on; bounds the time for lists of many overlapping tiles."""


@dataclass(frozen=True)
class WindowCall:
    """Sequences of one window, one after the other in the query rows and in the key rows.

    Attributes:
        h0, h1: query heads [h0, h1).
        step: buffer rows from one row of a sequence to its next.
        q0, k0: first query and key row, in buffer rows.
        q_lengths, k_lengths: rows and keys of each sequence. A sequence without rows, or one
            without keys, bridges a gap.
        left, right: the window, `OPEN_WINDOW` where nothing is cut.
    """

    h0: int
    h1: int
    step: int
    q0: int
    k0: int
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    left: int
    right: int

    @property
    def rows(self) -> slice:
        """Query rows of the buffer, bridges included."""
        return slice(self.q0, self.q0 + (sum(self.q_lengths) - 1) * self.step + 1, self.step)

    @property
    def keys(self) -> slice:
        """Key rows of the buffer, bridges included."""
        return slice(self.k0, self.k0 + (sum(self.k_lengths) - 1) * self.step + 1, self.step)

    @property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where each sequence starts in the rows and in the keys, and the totals."""
        q_starts = tuple(accumulate(self.q_lengths, initial=0))
        return q_starts, tuple(accumulate(self.k_lengths, initial=0))

    @property
    def is_local(self) -> bool:
        """Neither everything nor plain causal."""
        return (self.left, self.right) not in ((OPEN_WINDOW, OPEN_WINDOW), (OPEN_WINDOW, 0))

    @property
    def is_dense(self) -> bool:
        """One sequence that a call without lengths computes.

        flash-attention takes a right edge of at least the key count for open (`mha_fwd`), which
        it is not where there are more rows than keys; there lengths have to be given.
        """
        one = len(self.q_lengths) == 1
        return one and (not self.is_local or self.q_lengths[0] <= self.k_lengths[0])

    @property
    def longest(self) -> tuple[int, int]:
        """(rows, keys) to be given as the longest sequence's.

        Two rows at least: `mha_varlen_fwd` reads a longest of one row as "one row in every
        sequence". Keys at least the rows for local windows: a window edge of no less than the
        longest key count is taken for open, and an open edge becomes that count.
        """
        rows, keys = max(self.q_lengths), max(self.k_lengths)
        return max(rows, 2), max(rows, keys) if self.is_local else keys


@dataclass(frozen=True)
class _Edge:
    """A window edge: this width exactly, or any width from this one on."""

    width: int
    exact: bool

    def join(self, other: "_Edge") -> "_Edge | None":
        """The edge that fits both, None where there is none."""
        if self.exact == other.exact:
            if self.exact and self.width != other.width:
                return None
            return self if self.width >= other.width else other
        exact, loose = (self, other) if self.exact else (other, self)
        return exact if loose.width <= exact.width else None


@dataclass
class _Chain:
    """A call that may still grow."""

    call: WindowCall
    left: _Edge
    right: _Edge
    rows: int
    keys: int
    q_lengths: list[int] = field(default_factory=list)
    k_lengths: list[int] = field(default_factory=list)

    def take(self, other: "_Chain") -> bool:
        """Appends the one sequence of `other`; False, and nothing done, where it does not fit.

        A gap longer than what the chain has already costs more than a call of its own.
        """
        step = self.call.step
        q_gap, q_rest = divmod(other.call.q0 - self.call.q0 - self.rows * step, step)
        k_gap, k_rest = divmod(other.call.k0 - self.call.k0 - self.keys * step, step)
        left, right = self.left.join(other.left), self.right.join(other.right)
        if left is None or right is None or q_rest or k_rest:
            return False
        if not (0 <= q_gap <= self.rows and 0 <= k_gap <= self.keys):
            return False
        bridges = [(q_gap, 0)] * (q_gap > 0) + [(0, k_gap)] * (k_gap > 0)
        for rows, keys in (*bridges, (other.rows, other.keys)):
            self.q_lengths.append(rows)
            self.k_lengths.append(keys)
            self.rows, self.keys = self.rows + rows, self.keys + keys
        self.left, self.right = left, right
        return True

    def close(self) -> WindowCall:
        return replace(
            self.call,
            q_lengths=tuple(self.q_lengths),
            k_lengths=tuple(self.k_lengths),
            left=self.left.width if self.left.exact else OPEN_WINDOW,
            right=self.right.width if self.right.exact else OPEN_WINDOW,
        )


def window_calls(tiles: np.ndarray) -> tuple[WindowCall, ...]:
    """The calls that together compute a `TILE` table, each pair once."""
    chains: dict[tuple[int, int, int], list[_Chain]] = defaultdict(list)
    for tile in sorted(map(tight, lattice_tiles(tiles)), key=lambda t: (t.q0, t.k0)):
        open_chains = chains[tile.h0, tile.h1, tile.step]
        new = _chain(tile)
        if not any(chain.take(new) for chain in reversed(open_chains[-RECENT:])):
            open_chains.append(new)
    return tuple(chain.close() for group in chains.values() for chain in group)


def tight(tile: LatticeTile) -> LatticeTile:
    """The tile cropped to the rows and keys that it uses; it must allow a pair."""
    a0, a1 = max(0, -tile.hi), min(tile.rows, tile.keys - tile.lo)
    b0, b1 = max(0, a0 + tile.lo), min(tile.keys, a1 + tile.hi)
    return replace(
        tile,
        q0=tile.q0 + a0 * tile.step,
        k0=tile.k0 + b0 * tile.step,
        rows=a1 - a0,
        keys=b1 - b0,
        lo=tile.lo + a0 - b0,
        hi=tile.hi + a0 - b0,
    )


def _chain(tile: LatticeTile) -> _Chain:
    diagonal = tile.keys - tile.rows
    left = _Edge(diagonal - tile.lo, exact=True)
    right = _Edge(tile.hi - diagonal, exact=True)
    if tile.lo <= 1 - tile.rows:
        left = _Edge(tile.keys - 1, exact=False)
    if tile.hi >= tile.keys - 1:
        right = _Edge(tile.rows - 1, exact=False)
    call = WindowCall(
        h0=tile.h0,
        h1=tile.h1,
        step=tile.step,
        q0=tile.q0,
        k0=tile.k0,
        q_lengths=(),
        k_lengths=(),
        left=OPEN_WINDOW,
        right=OPEN_WINDOW,
    )
    return _Chain(call, left, right, tile.rows, tile.keys, [tile.rows], [tile.keys])

"""The zigzag ring for packed documents: every document is cut into 2P chunks of its own.

As public variable-length zigzag rings do. They want document lengths divisible by 2P, so documents
are padded at their end here; the padding travels, but no call computes it. Each step runs one
call per document, over the same half blocks as plain causal; documents that are not causal run one
call on all keys. Other masks are refused: these rings have none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from ringattn.benchmarks.peers.base import Prepared, Shape
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.packages import installed_version
from ringattn.benchmarks.peers.ring_pass import Ring, RingCall
from ringattn.benchmarks.peers.zigzag_ring import prepare_ring


@dataclass(frozen=True)
class _Share:
    """A rank's part of one document: chunks `rank` and 2P - 1 - `rank`, padded, at local `row`."""

    row: int
    chunk: int
    positions: tuple[int, ...]
    """Global tokens of the rows that are not padding; these come first in the share."""

    @property
    def rows(self) -> slice:
        """All rows with tokens."""
        return slice(self.row, self.row + len(self.positions))

    @property
    def first(self) -> slice:
        """Rows with tokens of the first chunk."""
        return slice(self.row, self.row + min(self.chunk, len(self.positions)))

    @property
    def second(self) -> slice:
        """Rows with tokens of the second chunk."""
        return slice(self.first.stop, self.rows.stop)


@dataclass(frozen=True)
class ZigzagVarlen:
    """See the module docstring. Implements `base.Contender`."""

    name: str = "zigzag_varlen"
    package: str = "ringattn"

    def installed(self) -> str | None:
        """Version of ringattn, which it is part of."""
        return installed_version(self.package, self.package)

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs a mask that is a list of documents, and a CPU."""
        del world
        if shape.device != "cpu":
            return "it calls PyTorch's CPU flash operator; ring_flash_attn is the same for CUDA"
        return None if case.is_packed else f"it has documents only, no mask like {case.name}"

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        shares = [_shares(case.lengths, source, world) for source in range(world)]
        steps = tuple(
            tuple(_calls(shares[rank], shares[(rank - step) % world], step, rank, case.causal))
            for step in range(world)
        )
        positions = document_positions(case.lengths, rank, world)
        note = "one call per document"
        return prepare_ring(Ring(rank, world, steps), positions, shape.inputs(case.seq_len), note)


def document_positions(lengths: tuple[int, ...], rank: int, world: int) -> np.ndarray:
    """Tokens of a rank where each document is padded at its end and cut into 2P chunks; -1 is
    padding."""
    positions = np.full(padded_rows(lengths, world), -1, dtype=np.int64)
    for share in _shares(lengths, rank, world):
        positions[share.rows] = share.positions
    return positions


def padded_rows(lengths: tuple[int, ...], world: int) -> int:
    """Rows of every rank's shard, padding included."""
    return sum(2 * _chunk(length, world) for length in lengths)


def _chunk(length: int, world: int) -> int:
    return -(-length // (2 * world))


def _shares(lengths: tuple[int, ...], rank: int, world: int) -> list[_Share]:
    shares, row = [], 0
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        chunk = _chunk(stop - start, world)
        positions = [
            token
            for index in (rank, 2 * world - 1 - rank)
            for token in range(start + index * chunk, min(start + (index + 1) * chunk, stop))
        ]
        shares.append(_Share(row, chunk, tuple(positions)))
        row += 2 * chunk
    return shares


def _calls(
    mine: list[_Share], visiting: list[_Share], step: int, rank: int, causal: bool
) -> Iterator[RingCall]:
    for share, other in zip(mine, visiting, strict=True):
        call = RingCall(share.rows, other.rows, first=step == 0)
        if causal and step == 0:
            call = replace(call, causal=True)
        elif causal:
            call = replace(call, k=other.first) if step <= rank else replace(call, q=share.second)
        if call.q.start < call.q.stop and call.k.start < call.k.stop:
            yield call

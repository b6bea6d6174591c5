"""A plain zigzag ring: 2P chunks, rank r holds chunks r and 2P - 1 - r, whole shards go round.

Causal runs one call per step: the whole local block under the causal flag, then all queries on the
first half of the keys, or the second half of the queries on all keys. Under any other mask each
pair of chunks is one call: left out where nothing is allowed, the causal flag or no mask where that
is the mask, else a dense additive mask, built before the clock starts. The bytes do not depend on
the mask.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from ringattn.benchmarks.peers.base import Prepared, Shape, Tensors, autograd_run
from ringattn.benchmarks.peers.cases import MaskCase, allowed_block
from ringattn.benchmarks.peers.local_sdpa import additive
from ringattn.benchmarks.peers.ring_pass import Ring, RingAttention, RingCall
from ringattn.masks import Mask

_EVERY = slice(None)


@dataclass(frozen=True)
class ZigzagRing:
    """See the module docstring. Implements `base.Contender`."""

    name: str = "zigzag_ring"

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs tokens divisible by 2P."""
        del shape
        if case.seq_len % (2 * world):
            return f"{case.seq_len} tokens do not divide into {2 * world} chunks"
        return None

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        chunk = case.seq_len // (2 * world)
        if case.name == "causal":
            ring, note = Ring(rank, world, _causal_steps(rank, world, chunk)), "half blocks"
        else:
            ring, note = Ring(rank, world, _masked_steps(case.mask(), rank, world)), "dense masks"
        starts = _chunk_starts(rank, world, chunk)
        positions = np.concatenate([np.arange(start, start + chunk) for start in starts])
        return prepare_ring(ring, positions, shape.inputs(case.seq_len), note)


def prepare_ring(ring: Ring, positions: np.ndarray, inputs: Tensors, note: str) -> Prepared:
    """A ring over the rows at `positions` (-1: a row of zeros) of whole inputs."""
    index = torch.from_numpy(positions)
    padded = (index < 0).view(1, -1, 1, 1)
    q, k, v, dout = (x[:, index.clamp_min(0)].masked_fill(padded, 0.0) for x in inputs)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = RingAttention.apply(q, k, v, ring)
        assert isinstance(out, torch.Tensor)
        return out

    return Prepared(positions, autograd_run(attend, (q, k, v), dout), note)


def ring_bytes(tokens: int, world: int, kv_heads: int, head_dim: int) -> int:
    """Bytes each rank sends in a forward and backward: `tokens` rows per shard, float32."""
    shard = 2 * tokens * kv_heads * head_dim * 4  # k and v, or dk and dv
    return 2 * (world - 1) * shard + world * shard


def _chunk_starts(rank: int, world: int, chunk: int) -> tuple[int, int]:
    return rank * chunk, (2 * world - 1 - rank) * chunk


def _causal_steps(rank: int, world: int, chunk: int) -> tuple[tuple[RingCall, ...], ...]:
    local = RingCall(_EVERY, _EVERY, causal=True, first=True)
    earlier = RingCall(_EVERY, slice(0, chunk))
    later = RingCall(slice(chunk, 2 * chunk), _EVERY)
    rest = [earlier if step <= rank else later for step in range(1, world)]
    return tuple((call,) for call in (local, *rest))


def _masked_steps(mask: Mask, rank: int, world: int) -> tuple[tuple[RingCall, ...], ...]:
    chunk = mask.seq_len // (2 * world)
    rows = _chunk_starts(rank, world, chunk)
    steps, seen = [], set()
    for step in range(world):
        keys = _chunk_starts((rank - step) % world, world, chunk)
        calls = []
        for (i, q0), (j, k0) in product(enumerate(rows), enumerate(keys)):
            call = _chunk_call(mask, q0, k0, chunk)
            if call is not None:
                place = [slice(n * chunk, (n + 1) * chunk) for n in (i, j)]
                calls.append(replace(call, q=place[0], k=place[1], first=i not in seen))
                seen.add(i)
        steps.append(tuple(calls))
    return tuple(steps)


def _chunk_call(mask: Mask, q0: int, k0: int, chunk: int) -> RingCall | None:
    """The call of a pair of chunks, its rows not placed yet; None where nothing is allowed."""
    allowed = torch.from_numpy(allowed_block(mask, range(q0, q0 + chunk), range(k0, k0 + chunk)))
    if not allowed.any():
        return None
    if allowed.all():
        return RingCall(_EVERY, _EVERY)
    if torch.equal(allowed, torch.ones_like(allowed).tril_()):
        return RingCall(_EVERY, _EVERY, causal=True)
    unseen = ~allowed.any(1)
    return RingCall(
        _EVERY, _EVERY, mask=additive(allowed), unseen=unseen if bool(unseen.any()) else None
    )

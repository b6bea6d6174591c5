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

from ringattn.benchmarks.peers.base import Prepared, Shape, Tensors, prepare_autograd, rows_at
from ringattn.benchmarks.peers.cases import MaskCase, allowed_block
from ringattn.benchmarks.peers.local_sdpa import additive, local_refusal
from ringattn.benchmarks.peers.packages import installed_version
from ringattn.benchmarks.peers.patterns import CAUSAL
from ringattn.benchmarks.peers.ring_pass import Ring, RingAttention, RingCall
from ringattn.masks import Mask

_EVERY = slice(None)


@dataclass(frozen=True)
class ZigzagRing:
    """See the module docstring. Implements `base.Contender`."""

    name: str = "zigzag_ring"
    package: str = "ringattn"

    def installed(self) -> str | None:
        """Version of ringattn, which it is part of."""
        return installed_version(self.package, self.package)

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs tokens divisible by 2P, a CPU, and a mask that fits into memory."""
        if shape.device != "cpu":
            return "it calls PyTorch's CPU flash operator; ring_flash_attn is the same for CUDA"
        if case.seq_len % (2 * world):
            return f"{case.seq_len} tokens do not divide into {2 * world} chunks"
        return local_refusal(case, shape)

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        chunk = case.seq_len // (2 * world)
        if case.pattern == CAUSAL:
            ring, note = Ring(rank, world, _causal_steps(rank, world, chunk)), "half blocks"
        else:
            steps = _masked_steps(case.mask(), shape, rank, world)
            ring, note = Ring(rank, world, steps), "dense masks"
        positions = zigzag_positions(case.seq_len, rank, world)
        return prepare_ring(ring, positions, shape.inputs(case.seq_len), note)


def zigzag_positions(seq_len: int, rank: int, world: int) -> np.ndarray:
    """Tokens of a rank: chunks `rank` and 2P - 1 - `rank` of 2P."""
    chunk = seq_len // (2 * world)
    starts = _chunk_starts(rank, world, chunk)
    return np.concatenate([np.arange(start, start + chunk) for start in starts])


def prepare_ring(ring: Ring, positions: np.ndarray, inputs: Tensors, note: str) -> Prepared:
    """A ring over the rows at `positions` (-1: a row of zeros) of whole inputs."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = RingAttention.apply(q, k, v, ring)
        assert isinstance(out, torch.Tensor)
        return out

    return prepare_autograd(positions, attend, rows_at(inputs, positions), note)


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


def _masked_steps(
    mask: Mask, shape: Shape, rank: int, world: int
) -> tuple[tuple[RingCall, ...], ...]:
    chunk = mask.seq_len // (2 * world)
    rows = _chunk_starts(rank, world, chunk)
    steps, seen = [], set()
    for step in range(world):
        keys = _chunk_starts((rank - step) % world, world, chunk)
        calls = []
        for (i, q0), (j, k0) in product(enumerate(rows), enumerate(keys)):
            call = _chunk_call(mask, shape, q0, k0, chunk)
            if call is not None:
                place = [slice(n * chunk, (n + 1) * chunk) for n in (i, j)]
                calls.append(replace(call, q=place[0], k=place[1], first=i not in seen))
                seen.add(i)
        steps.append(tuple(calls))
    return tuple(steps)


def _chunk_call(mask: Mask, shape: Shape, q0: int, k0: int, chunk: int) -> RingCall | None:
    """The call of a pair of chunks, its rows not placed yet; None where nothing is allowed."""
    rows, keys = range(q0, q0 + chunk), range(k0, k0 + chunk)
    allowed = torch.from_numpy(allowed_block(mask, rows, keys, shape.q_heads))
    if not allowed.any():
        return None
    if allowed.all():
        return RingCall(_EVERY, _EVERY)
    if allowed.ndim == 2 and torch.equal(allowed, torch.ones_like(allowed).tril_()):
        return RingCall(_EVERY, _EVERY, causal=True)
    unseen = ~allowed.any(-1)
    dense = additive(allowed, shape.dtype)
    return RingCall(_EVERY, _EVERY, mask=dense, unseen=unseen if bool(unseen.any()) else None)

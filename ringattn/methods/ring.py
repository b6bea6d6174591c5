"""KV ring: keys and values circulate, queries stay; in the backward dK and dV circulate too.

Source: Ring Attention (arXiv 2310.01889); the fused ring of zhuzilin/ring-flash-attention.
Bytes received per rank for equal shards and a full mask, u = n * D, P ranks, e bytes of K and V,
g bytes of a travelling gradient: forward 2 (P-1) u Hkv e, backward 2 (P-1) u Hkv (e + g).

A block travels only as far as a rank still needs it, and only the hull of the rows needed from
there on. A gradient starts at the first rank that contributes and goes home from the last. The
local gradient never travels, and half of the local work waits for the last step, where it hides
the returning gradients.
"""

from dataclasses import dataclass

import numpy as np

from ringattn.methods.common import Problem, finish, halve, moves_of, tasks_of
from ringattn.schedule import MOVE, Channel, Op, Schedule, Wire

NONE = 1 << 40


@dataclass(frozen=True)
class _Hulls:
    """First and last + 1 needed row of block b at each hop, (P, P); empty where low >= high."""

    low: np.ndarray
    high: np.ndarray

    def onward(self) -> "_Hulls":
        """Rows needed at a hop or at any later one."""
        return _Hulls(
            np.minimum.accumulate(self.low[:, ::-1], axis=1)[:, ::-1],
            np.maximum.accumulate(self.high[:, ::-1], axis=1)[:, ::-1],
        )

    def so_far(self) -> "_Hulls":
        """Rows needed at a hop or at any earlier one."""
        return _Hulls(
            np.minimum.accumulate(self.low, axis=1), np.maximum.accumulate(self.high, axis=1)
        )

    @property
    def rows(self) -> np.ndarray:
        return np.maximum(self.high - self.low, 0)


def _remote_hulls(problem: Problem) -> _Hulls:
    world, hop = problem.world, _hops(problem)
    low = np.full((world, world), NONE, dtype=np.int64)
    high = np.zeros((world, world), dtype=np.int64)
    remote = hop > 0
    where = (problem.k_rank[remote], hop[remote])
    np.minimum.at(low, where, problem.pieces["k0"][remote])
    np.maximum.at(high, where, problem.pieces["k1"][remote])
    return _Hulls(low, high)


def _hops(problem: Problem) -> np.ndarray:
    return (problem.q_rank - problem.k_rank) % problem.world


def _kv_moves(problem: Problem, hulls: _Hulls) -> np.ndarray:
    """Hop t brings block b from rank b + t - 1 to b + t while step t - 1 computes."""
    world = problem.world
    needed = hulls.onward()
    block, hop = (x.ravel() for x in np.indices((world, world)))
    block, hop = block[hop > 0], hop[hop > 0]
    return moves_of(
        problem,
        len(block),
        post=hop - 1,
        src=(block + hop - 1) % world,
        dst=(block + hop) % world,
        channel=Channel.K,
        sslot=_kv_slot(hop - 1),
        dslot=_kv_slot(hop),
        s0=needed.low[block, hop],
        rows=needed.rows[block, hop],
        op=Op.SET,
        dtype=Wire.INPUT,
    )


def _kv_slot(hop: np.ndarray) -> np.ndarray:
    """Home at hop 0, then two buffers in turn: one is read while the other fills."""
    return np.where(hop == 0, 0, 1 + (hop - 1) % 2)


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    hop = _hops(problem)
    tasks = tasks_of(problem, problem.pieces, problem.q_rank, hop, _kv_slot(hop))
    return finish(problem, "forward", "ring", tasks, _kv_moves(problem, _remote_hulls(problem)))


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    hulls, hop = _remote_hulls(problem), _hops(problem)
    returns = _gradient_moves(problem, hulls)
    tasks = tasks_of(problem, problem.pieces, problem.q_rank, hop, _kv_slot(hop), _grad_slot(hop))
    local = hop == 0
    late = int(returns["land"].max(initial=0))
    if late:
        tasks = np.concatenate([halve(tasks[local], late), tasks[~local]])
    moves = np.concatenate([_kv_moves(problem, hulls), returns])
    return finish(problem, "backward", "ring", tasks, moves)


def _grad_slot(hop: np.ndarray) -> np.ndarray:
    return np.where(hop == 0, 0, 1 + hop % 2)


def _gradient_moves(problem: Problem, hulls: _Hulls) -> np.ndarray:
    """A hop after its contribution, a partial goes on to the next rank, or home from the last."""
    world = problem.world
    touched, grown = hulls.rows > 0, hulls.so_far()
    if not touched.any():
        return np.empty(0, dtype=MOVE)
    last = np.where(touched.any(axis=1), world - 1 - np.argmax(touched[:, ::-1], axis=1), -1)
    block, hop = (x.ravel() for x in np.indices((world, world)))
    keep = (hop > 0) & (hop <= last[block])
    block, hop = block[keep], hop[keep]
    home = hop == last[block]
    return moves_of(
        problem,
        len(block),
        post=hop + 1,
        src=(block + hop) % world,
        dst=np.where(home, block, (block + hop + 1) % world),
        channel=Channel.DKV,
        sslot=_grad_slot(hop),
        dslot=np.where(home, 0, _grad_slot(hop + 1)),
        s0=grown.low[block, hop],
        rows=grown.rows[block, hop],
        op=Op.ADD,
        take=1,
        dtype=problem.wire,
    )

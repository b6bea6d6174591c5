"""Double ring: blocks circulate inside a node while the next window's blocks cross between nodes.

Source: the topology-aware ring of BurstEngine (arXiv 2509.19836, section 3.1) and LoongTrain's
DoubleRing (arXiv 2406.18485). N nodes of L ranks. In window w a node works on the blocks of the
node w places behind it: at inner step s, rank (node, l) holds block (node - w, l - s). The block of
the next window leaves its rank at the window's first step and is awaited at its last, so one
crossing hides behind L steps, and all ranks' links cross at once.
Bytes received per rank for equal shards and a full mask: forward 2 (P-1) u Hkv e, of which
2 (N-1) u Hkv e between nodes; backward 2 (P-1) u Hkv (e + g), plus 2 (N-1) u Hkv g for bringing
each window's gradients to the rank that crosses (none of it for L = 1).

The rank that receives a block from outside keeps a window's dK, dV; the others' circulate to it one
step behind, and the sum then crosses home during the next window.
"""

import math
from dataclasses import dataclass

import numpy as np

from ringattn.methods.common import NONE, Problem, finish, halve, moves_of, tasks_of
from ringattn.schedule import MOVE, Channel, Direction, Op, Schedule, Wire


@dataclass(frozen=True)
class _Rings:
    """Hulls of needed key rows by (block, window, inner step), and the ranks on their way."""

    problem: Problem
    nodes: int
    local: int
    low: np.ndarray
    high: np.ndarray

    def place(self, block: np.ndarray, window: np.ndarray, inner: np.ndarray) -> np.ndarray:
        """The rank that holds a block at (window, inner step)."""
        node = (block // self.local + window) % self.nodes
        return node * self.local + (block + inner) % self.local

    def time(self, window: np.ndarray, inner: np.ndarray) -> np.ndarray:
        """The plan step of (window, inner step)."""
        return window * self.local + inner


def _rings(problem: Problem) -> tuple[_Rings, np.ndarray, np.ndarray]:
    """The rings, and window and inner step of each piece."""
    # Where the ranks do not fill whole nodes, windows are as long as divides both.
    local = math.gcd(problem.ranks_per_node, problem.world)
    nodes = problem.world // local
    block, place = problem.k_rank, problem.q_rank
    window = (place // local - block // local) % nodes
    inner = (place - block) % local
    low = np.full((problem.world, nodes, local), NONE, dtype=np.int64)
    high = np.zeros_like(low)
    np.minimum.at(low, (block, window, inner), problem.pieces["k0"])
    np.maximum.at(high, (block, window, inner), problem.pieces["k1"])
    low[:, 0, 0], high[:, 0, 0] = NONE, 0  # at home nothing has to be moved
    return _Rings(problem, nodes, local, low, high), window, inner


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "forward")


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "backward")


def _plan(problem: Problem, direction: Direction) -> Schedule:
    rings, window, inner = _rings(problem)
    moves = [_inner_keys(rings), _crossing_keys(rings)]
    tasks = tasks_of(
        problem, problem.pieces, problem.q_rank, rings.time(window, inner),
        kslot=_slot(window, inner), gslot=_slot(window, inner),
    )  # fmt: skip
    if direction == "backward":
        returns = np.concatenate([_inner_gradients(rings), _crossing_gradients(rings)])
        late = int(returns["land"].max(initial=0))
        home = (window == 0) & (inner == 0)
        if late:
            tasks = np.concatenate([halve(tasks[home], late), tasks[~home]])
        moves.append(returns)
    return finish(problem, direction, "double_ring", tasks, np.concatenate(moves))


def _turn(count: np.ndarray, first: int) -> np.ndarray:
    """Two buffers in turn, numbered from `first`."""
    return first + (count - 1) % 2


def _slot(window: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The slot of a block, and of its gradient, at (window, inner step)."""
    return np.where(inner > 0, _turn(inner, 3), np.where(window > 0, _turn(window, 1), 0))


def _columns(rings: _Rings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(x.ravel() for x in np.indices(rings.low.shape))  # type: ignore[return-value]


def _span(low: np.ndarray, high: np.ndarray, where: tuple) -> dict[str, np.ndarray]:
    return {"s0": low[where], "rows": np.maximum(high[where] - low[where], 0)}


def _inner_keys(rings: _Rings) -> np.ndarray:
    """Inside a node a block goes one rank on per step, as far as its window still needs it."""
    low = np.minimum.accumulate(rings.low[:, :, ::-1], axis=2)[:, :, ::-1]
    high = np.maximum.accumulate(rings.high[:, :, ::-1], axis=2)[:, :, ::-1]
    block, window, inner = _columns(rings)
    keep = inner > 0
    block, window, inner = block[keep], window[keep], inner[keep]
    return moves_of(
        rings.problem, len(block), post=rings.time(window, inner - 1),
        src=rings.place(block, window, inner - 1), dst=rings.place(block, window, inner),
        channel=Channel.K, sslot=_slot(window, inner - 1), dslot=_slot(window, inner),
        op=Op.SET, dtype=Wire.INPUT, **_span(low, high, (block, window, inner)),
    )  # fmt: skip


def _crossing_keys(rings: _Rings) -> np.ndarray:
    """Between nodes a block travels for a whole window, as far as any later window needs it."""
    low = np.minimum.accumulate(rings.low.min(axis=2)[:, ::-1], axis=1)[:, ::-1]
    high = np.maximum.accumulate(rings.high.max(axis=2)[:, ::-1], axis=1)[:, ::-1]
    block, window = (x.ravel() for x in np.indices(low.shape))
    block, window = block[window > 0], window[window > 0]
    zero = np.zeros_like(window)
    return moves_of(
        rings.problem, len(block), post=rings.time(window - 1, zero),
        land=rings.time(window, zero) - 1,
        src=rings.place(block, window - 1, zero), dst=rings.place(block, window, zero),
        channel=Channel.K, sslot=_slot(window - 1, zero), dslot=_slot(window, zero),
        op=Op.SET, dtype=Wire.INPUT, **_span(low, high, (block, window)),
    )  # fmt: skip


def _inner_gradients(rings: _Rings) -> np.ndarray:
    """A step after its contribution a partial goes on, or to the window's first rank at the end."""
    low, high = rings.low.copy(), rings.high.copy()
    low[:, :, 0], high[:, :, 0] = NONE, 0
    touched = high > low
    last = np.where(
        touched.any(axis=2), rings.local - 1 - np.argmax(touched[:, :, ::-1], axis=2), 0
    )
    low, high = np.minimum.accumulate(low, axis=2), np.maximum.accumulate(high, axis=2)
    block, window, inner = _columns(rings)
    keep = (inner > 0) & (inner <= last[block, window])
    block, window, inner = block[keep], window[keep], inner[keep]
    ends = inner == last[block, window]
    following = np.where(ends, 0, inner + 1)
    return moves_of(
        rings.problem, len(block), post=rings.time(window, inner + 1),
        src=rings.place(block, window, inner), dst=rings.place(block, window, following),
        channel=Channel.DKV, sslot=_slot(window, inner),
        dslot=_slot(window, following), op=Op.ADD, take=1, dtype=rings.problem.wire,
        **_span(low, high, (block, window, inner)),
    )  # fmt: skip


def _crossing_gradients(rings: _Rings) -> np.ndarray:
    """A window's sum crosses home during the window after the next rank's partials arrived."""
    low, high = rings.low.min(axis=2), rings.high.max(axis=2)
    block, window = (x.ravel() for x in np.indices(low.shape))
    block, window = block[window > 0], window[window > 0]
    if not len(block):
        return np.empty(0, dtype=MOVE)
    zero = np.zeros_like(window)
    complete = rings.time(window + 1, zero) + (1 if rings.local > 1 else 0)
    return moves_of(
        rings.problem, len(block), post=complete,
        land=np.maximum(rings.time(window + 2, zero) - 1, complete),
        src=rings.place(block, window, zero), dst=block, channel=Channel.DKV,
        sslot=_slot(window, zero), op=Op.ADD, take=1, dtype=rings.problem.wire,
        **_span(low, high, (block, window)),
    )  # fmt: skip

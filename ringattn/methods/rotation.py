"""Rotation: blocks of one side (keys or queries) circulate, results follow or go home.

What ring and burst share. A block travels only as far as a rank still needs it, and only the hull
of the rows needed from there on. Results for circulating rows (dK and dV, or O, or dQ) start at the
first rank that contributes, follow the block one step behind, and go home from the last. What stays
at home never travels, and half of the local work waits for the last step, where it hides the
returning results.
"""

from dataclasses import dataclass

import numpy as np

from ringattn.methods.common import Hulls, Problem, finish, halve, hulls_of, moves_of, tasks_of
from ringattn.schedule import MOVE, Channel, Direction, Op, Schedule, Wire


@dataclass(frozen=True)
class _Side:
    """The circulating side: its channel, its result's channel or None, and its tile columns."""

    channel: Channel
    result: Channel | None
    rows: str

    @classmethod
    def of(cls, side: Channel, direction: Direction) -> "_Side":
        if side == Channel.K:
            return cls(Channel.K, Channel.DKV if direction == "backward" else None, "k")
        return cls(Channel.Q, Channel.DQ if direction == "backward" else Channel.O, "q")


def _onward(hulls: Hulls) -> Hulls:
    """Rows needed at a hop or at any later one."""
    return Hulls(
        np.minimum.accumulate(hulls.low[:, ::-1], axis=1)[:, ::-1],
        np.maximum.accumulate(hulls.high[:, ::-1], axis=1)[:, ::-1],
    )


def _so_far(hulls: Hulls) -> Hulls:
    """Rows needed at a hop or at any earlier one."""
    return Hulls(
        np.minimum.accumulate(hulls.low, axis=1), np.maximum.accumulate(hulls.high, axis=1)
    )


def rotate(problem: Problem, direction: Direction, side: Channel, method: str) -> Schedule:
    """Plans one direction with blocks of `side` (Channel.K or Channel.Q) circulating.

    Pure host work; every rank builds the same schedule.
    """
    moving = _Side.of(side, direction)
    block, place = problem.k_rank, problem.q_rank
    if side == Channel.Q:
        block, place = place, block
    hop = (place - block) % problem.world
    hulls = hulls_of(problem, block, hop, hop > 0, moving.rows)
    returns = _result_moves(problem, hulls, moving)
    slot = {"kslot": _block_slot(hop)} if side == Channel.K else {"qslot": _block_slot(hop)}
    if moving.result is not None:
        slot["gslot" if moving.result == Channel.DKV else "oslot"] = _result_slot(hop)
    tasks = tasks_of(problem, problem.pieces, place, hop, **slot)
    late = int(returns["land"].max(initial=0))
    if late:
        tasks = np.concatenate([halve(tasks[hop == 0], late), tasks[hop > 0]])
    moves = np.concatenate([_block_moves(problem, hulls, moving), returns])
    return finish(problem, direction, method, tasks, moves)


def _block_slot(hop: np.ndarray) -> np.ndarray:
    """Home at hop 0, then two buffers in turn: one is read while the other fills."""
    return np.where(hop == 0, 0, 1 + (hop - 1) % 2)


def _result_slot(hop: np.ndarray) -> np.ndarray:
    return np.where(hop == 0, 0, 1 + hop % 2)


def _block_moves(problem: Problem, hulls: Hulls, moving: _Side) -> np.ndarray:
    """Hop t brings block b from rank b + t - 1 to b + t while step t - 1 computes."""
    world = problem.world
    needed = _onward(hulls)
    block, hop = (x.ravel() for x in np.indices((world, world)))
    block, hop = block[hop > 0], hop[hop > 0]
    return moves_of(
        problem,
        len(block),
        post=hop - 1,
        src=(block + hop - 1) % world,
        dst=(block + hop) % world,
        channel=moving.channel,
        sslot=_block_slot(hop - 1),
        dslot=_block_slot(hop),
        s0=needed.low[block, hop],
        rows=needed.rows[block, hop],
        op=Op.SET,
        dtype=Wire.INPUT,
    )


def _result_moves(problem: Problem, hulls: Hulls, moving: _Side) -> np.ndarray:
    """A hop after its contribution, a partial goes on to the next rank, or home from the last."""
    world = problem.world
    touched, grown = hulls.rows > 0, _so_far(hulls)
    if moving.result is None or not touched.any():
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
        channel=moving.result,
        sslot=_result_slot(hop),
        dslot=np.where(home, 0, _result_slot(hop + 1)),
        s0=grown.low[block, hop],
        rows=grown.rows[block, hop],
        op=Op.ADD,
        take=1,
        dtype=problem.wire,
    )

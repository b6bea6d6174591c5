"""Overlapping the way into head slices and out of them with the work of other heads.

After `ringattn.methods.heads.compose`, a first step brings queries, keys and values to the ranks
that share heads, and a last one brings results home, with little beside them to hide them. Where
the inner plan starts with some heads and ends with others, queries of heads that start later may
come a step later, and results of heads that are done earlier go a step earlier.
"""

import numpy as np

from ringattn.methods.common import Problem, finish
from ringattn.schedule import Channel, Schedule

_POOLED = 1  # the slot that compose pools tokens in


def overlapped(problem: Problem, schedule: Schedule, method: str) -> Schedule:
    """A composed schedule with its way in and out spread over two steps each, by heads.

    Pure host work; every rank builds the same schedule.
    """
    tasks, moves, last = schedule.tasks.copy(), schedule.moves, schedule.nsteps - 1
    if last < 3:
        return schedule
    heads, world = problem.shapes.q_heads, problem.world
    first, final = np.full((world, heads), last), np.zeros((world, heads), dtype=np.int64)
    for slot, table, pick in (("qslot", first, np.minimum), ("oslot", final, np.maximum)):
        held = tasks[tasks[slot] == _POOLED]
        order = np.unique(held[["rank", "h0", "h1", "step"]])
        for rank, h0, h1, step in order.tolist():
            table[rank, h0:h1] = pick(table[rank, h0:h1], step)
    # Heads below `early` start in step 1; heads below `done` are final two steps before the end.
    early = heads - np.argmax(first[:, ::-1] <= 1, axis=1)
    early = np.where((first <= 1).any(axis=1), early, 0)
    done = np.argmax(final >= last - 1, axis=1)
    done = np.where((final >= last - 1).any(axis=1), done, heads)
    there = (moves["channel"] == Channel.Q) & (moves["post"] == 0) & (moves["dslot"] == _POOLED)
    results = (moves["channel"] == Channel.O) | (moves["channel"] == Channel.DQ)
    back = results & (moves["post"] == last) & (moves["sslot"] == _POOLED)
    now, later = _cut(moves[there], early[moves["dst"][there]], "dh")
    sooner, rest = _cut(moves[back], done[moves["src"][back]], "sh")
    later["post"] = later["land"] = 1
    sooner["post"] = sooner["land"] = last - 1
    moves = np.concatenate([moves[~there & ~back], now, later, sooner, rest])
    return finish(problem, schedule.direction, method, tasks, moves)


def _cut(moves: np.ndarray, head: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Each move's heads below `head` of the slice, and the others; empty parts drop out."""
    below, above = moves.copy(), moves.copy()
    count = np.clip(head - moves[side], 0, moves["nheads"])
    below["nheads"] = count
    above["nheads"] -= count
    for name in ("sh", "dh"):
        above[name] += count
    return below[below["nheads"] > 0], above[above["nheads"] > 0]

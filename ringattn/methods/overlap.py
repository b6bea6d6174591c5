"""Overlapping the way into head slices and out of them with the work of other heads.

After `ringattn.methods.heads.compose`, a first step brings queries, keys and values to the ranks
that share heads, and a last one brings results home, with little beside them to hide them. Where
the inner plan starts with some heads and ends with others, queries of heads that start later may
come a step later, and results of heads that are done earlier go a step earlier.
"""

import numpy as np

from ringattn.bands import expand_ranges
from ringattn.schedule import Channel

_POOLED = 1  # the slot that compose pools tokens in
_RESULTS = (int(Channel.O), int(Channel.DQ))


def overlapped(
    tasks: np.ndarray, moves: np.ndarray, last: int, world: int, heads: int
) -> np.ndarray:
    """A composed plan's moves (written to) with its way in and out over two steps each, by heads.

    tasks, moves: with the way in at step 0 and the way out at step `last`. heads: at least those of
    a slice.
    """
    if last < 3:
        return moves
    first, final = np.full((world, heads), last), np.zeros((world, heads), dtype=np.int64)
    for slot, table, pick in (("qslot", first, np.minimum), ("oslot", final, np.maximum)):
        held = np.flatnonzero(tasks[slot] == _POOLED)
        key = (tasks["rank"][held] * heads + tasks["h0"][held]) * (heads + 1) + tasks["h1"][held]
        key = np.unique(key * (last + 1) + tasks["step"][held])
        key, step = np.divmod(key, last + 1)
        key, h1 = np.divmod(key, heads + 1)
        rank, h0 = np.divmod(key, heads)
        which, head = expand_ranges(h0, h1)
        pick.at(table, (rank[which], head), step[which])
    # Heads below `early` start in step 1; heads below `done` are final two steps before the end.
    early = heads - np.argmax(first[:, ::-1] <= 1, axis=1)
    early = np.where((first <= 1).any(axis=1), early, 0)
    done = np.argmax(final >= last - 1, axis=1)
    done = np.where((final >= last - 1).any(axis=1), done, heads)
    post, channel = moves["post"], moves["channel"]
    first_step, last_step = np.flatnonzero(post == 0), np.flatnonzero(post == last)
    keep = (channel[first_step] == Channel.Q) & (moves["dslot"][first_step] == _POOLED)
    there = first_step[keep]
    keep = np.isin(channel[last_step], _RESULTS) & (moves["sslot"][last_step] == _POOLED)
    back = last_step[keep]
    later = _cut(moves, there, early[moves["dst"][there]], "dh")
    rest = _cut(moves, back, done[moves["src"][back]], "sh")
    later["post"] = later["land"] = 1
    moves["post"][back] = moves["land"][back] = last - 1
    moves = np.concatenate([moves, later, rest])
    empty = moves["nheads"] == 0
    return moves[~empty] if empty.any() else moves


def _cut(moves: np.ndarray, index: np.ndarray, head: np.ndarray, side: str) -> np.ndarray:
    """Leaves moves their heads below `head` of the slice, in place; returns moves of the others."""
    above = moves[index]
    count = np.clip(head - above[side], 0, above["nheads"])
    moves["nheads"][index] = count
    above["nheads"] -= count
    for name in ("sh", "dh"):
        above[name] += count
    return above

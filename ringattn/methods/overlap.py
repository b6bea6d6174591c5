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


def overlapped(
    tasks: np.ndarray, moves: np.ndarray, last: int, world: int, heads: int
) -> np.ndarray:
    """The moves of a composed plan with its way in and out spread over two steps each, by heads.

    tasks, moves: with the way in at step 0 and the way out at step `last`. heads: at least those of
    a slice.
    """
    if last < 3:
        return moves
    first, final = np.full((world, heads), last), np.zeros((world, heads), dtype=np.int64)
    for slot, table, pick in (("qslot", first, np.minimum), ("oslot", final, np.maximum)):
        held = tasks[tasks[slot] == _POOLED]
        key = (held["rank"] * heads + held["h0"]) * (heads + 1) + held["h1"]
        key = np.unique(key * (last + 1) + held["step"])
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
    there = (moves["channel"] == Channel.Q) & (moves["post"] == 0) & (moves["dslot"] == _POOLED)
    results = (moves["channel"] == Channel.O) | (moves["channel"] == Channel.DQ)
    back = results & (moves["post"] == last) & (moves["sslot"] == _POOLED)
    now, later = _cut(moves[there], early[moves["dst"][there]], "dh")
    sooner, rest = _cut(moves[back], done[moves["src"][back]], "sh")
    later["post"] = later["land"] = 1
    sooner["post"] = sooner["land"] = last - 1
    return np.concatenate([moves[~there & ~back], now, later, sooner, rest])


def _cut(moves: np.ndarray, head: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Each move's heads below `head` of the slice, and the others; empty parts drop out."""
    below, above = moves.copy(), moves.copy()
    count = np.clip(head - moves[side], 0, moves["nheads"])
    below["nheads"] = count
    above["nheads"] -= count
    for name in ("sh", "dh"):
        above[name] += count
    return below[below["nheads"] > 0], above[above["nheads"] > 0]

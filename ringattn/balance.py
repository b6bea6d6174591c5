"""Balancing teams of ranks: runs of tokens to teams, equal in tokens, as equal as can be in work.

A team is a number of ranks that share the heads of their tokens (a node, or a part of one). What is
placed are items: runs of consecutive tokens, some of which must stay whole. The work of any run is
read off one running sum over blocks of 128 tokens.
"""

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ringattn import bands as band_ops
from ringattn.masks import Mask
from ringattn.tiles import cropped_bands

KEY = 256  # pairs that a kernel could compute in the time that it spends on each key of a tile
BLOCK = 128  # kernels like cuts at multiples of it
CLOSE = 0.01  # share of the mean load within which teams count as balanced
_TRIED = 3  # teams with little that a team with much is paired with before it is given up
_LEAST = 0.35  # share of what an exchange should shift that makes it worth its cuts


class Work:
    """Mask area of the queries of any run of tokens, and what kernels pay for the run's keys."""

    def __init__(self, mask: Mask) -> None:
        self._bands = bands = mask.bands
        edges = np.arange(0, mask.seq_len + BLOCK, BLOCK)
        bounds = np.concatenate([bands["q0"], bands["q1"]])
        if len(bounds) <= len(edges):
            edges = np.concatenate([edges, bounds])
        self._edges = np.unique(np.minimum(edges, mask.seq_len))
        area = mask.row_area(self._edges[:-1], self._edges[1:])
        self._sum = np.concatenate([[0.0], np.cumsum(area)])

    @property
    def total(self) -> float:
        """Work of all tokens."""
        return float(self._sum[-1])

    def of(self, start: Any, stop: Any) -> np.ndarray:
        """Work of the run [start, stop), or of each of arrays of runs."""
        low, high = (
            np.interp(start, self._edges, self._sum),
            np.interp(stop, self._edges, self._sum),
        )
        return high - low

    def load(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Work of disjoint sorted runs, with the cost of the keys that they attend."""
        part, run = cropped_bands(self._bands, start, stop)
        low = np.maximum(part["k0"], part["q0"] + part["lo"])
        high = np.minimum(part["k1"], part["q1"] + part["hi"])
        keys = np.maximum(band_ops.ceil_div(high - low, part["step"]), 0)
        return self.of(start, stop) + KEY * np.bincount(run, keys, len(start))

    def split(self, start: int, stop: int, parts: int) -> np.ndarray:
        """Cuts of a run into parts of equal work, at multiples of the block from its start."""
        low, high = np.interp([start, stop], self._edges, self._sum)
        goals = low + (high - low) * np.arange(1, parts) / parts
        cuts = np.interp(goals, self._sum, self._edges)
        cuts = start + np.round((cuts - start) / BLOCK).astype(np.int64) * BLOCK
        return np.unique(np.concatenate([[start], np.clip(cuts, start, stop), [stop]]))


@dataclass
class Team:
    """What a team holds: runs (start, stop, whole) and the tokens that it may take yet."""

    room: int
    load: float = 0.0
    items: list[tuple[int, int, bool]] = field(default_factory=list)


def spread(items: list[tuple[int, int, bool]], work: Work, room: list[int]) -> list[Team]:
    """Every item, largest first, to the least loaded team with room; cut where a team is full.

    Args:
        items: disjoint (start, stop, whole). work: of their tokens. room: tokens of each team.
    """
    teams = [Team(tokens) for tokens in room]
    heap = [(0.0, index) for index, tokens in enumerate(room) if tokens]
    start, stop = (np.array([item[axis] for item in items], dtype=np.int64) for axis in (0, 1))
    order = np.argsort(start)
    weights = np.empty(len(items))
    weights[order] = work.load(start[order], stop[order])
    for index in np.argsort(-weights, kind="stable").tolist():
        begin, end, whole = items[index]
        while begin < end:
            load, number = heapq.heappop(heap)
            team = teams[number]
            taken = min(team.room, end - begin)
            share = float(weights[index]) * taken / int(stop[index] - start[index])
            # A part of what should stay whole is like any other run.
            team.items.append((begin, begin + taken, whole and taken == stop[index] - start[index]))
            team.load, team.room, begin = load + share, team.room - taken, begin + taken
            if team.room:
                heapq.heappush(heap, (team.load, number))
    for team in teams:
        team.load = _load(team, work)
    return teams


def equalize(teams: list[Team], work: Work, spare: int = 0) -> None:
    """Exchanges runs of equal length between the most and the least loaded team, in place.

    Ends when all are close to the mean, or nothing helps. `spare` tokens may go to a team beyond
    its equal share: then runs move without return.
    """
    extra = [spare] * len(teams)
    for _ in range(16 + 2 * len(teams)):
        mean = sum(team.load for team in teams) / len(teams)
        order = sorted(range(len(teams)), key=lambda index: teams[index].load)
        if teams[order[-1]].load - mean <= CLOSE * mean:
            return
        if not any(_relieve(teams, work, order[-1], low, mean, extra) for low in order[:_TRIED]):
            return


def _relieve(
    teams: list[Team], work: Work, most: int, least: int, mean: float, extra: list[int]
) -> bool:
    """Shifts work from one team to another, unless that makes the larger load no less."""
    high, low = teams[most], teams[least]
    goal = min(high.load - mean, mean - low.load)
    goal = max(goal, (high.load - low.load) / 4)
    if goal <= 0:
        return False
    before = list(high.items), list(low.items), high.load, low.load
    moved = _give(high, low, work, goal, extra[least]) if extra[least] >= BLOCK else 0
    if not moved and not exchange(high, low, work, goal):
        return False
    high.load, low.load = _load(high, work), _load(low, work)
    if max(high.load, low.load) >= before[2]:  # more keys to attend outweigh the balance
        high.items, low.items, high.load, low.load = before
        return False
    extra[least], extra[most] = extra[least] - moved, extra[most] + moved
    return True


def _load(team: Team, work: Work) -> float:
    runs = np.array(sorted(item[:2] for item in team.items), dtype=np.int64).reshape(-1, 2)
    breaks = np.flatnonzero(runs[1:, 0] != runs[:-1, 1])
    start = runs[np.concatenate([[0], breaks + 1])[: len(runs)], 0]
    stop = runs[np.concatenate([breaks, [len(runs) - 1]])[: len(runs)], 1]
    return float(work.load(start, stop).sum())


def _columns(team: Team) -> tuple[np.ndarray, ...]:
    start, stop, whole = zip(*team.items, strict=True)
    return np.array(start), np.array(stop), np.array(whole)


def exchange(high: Team, low: Team, work: Work, goal: float) -> bool:
    """Swaps the end of a run of `high` for the beginning of one of `low`, equally long, so that
    about `goal` of work changes hands; whether one was found."""
    if not high.items or not low.items:
        return False
    a0, a1, a_whole = (x[:, None] for x in _columns(high))
    b0, b1, b_whole = (x[None, :] for x in _columns(low))
    a_length, b_length = a1 - a0, b1 - b0
    length = np.minimum(a_length, b_length)
    possible = (~a_whole | (length == a_length)) & (~b_whole | (length == b_length))
    shift = np.where(possible, work.of(a1 - length, a1) - work.of(b0, b0 + length), -np.inf)
    fixed = a_whole | b_whole
    cuts = (length < a_length).astype(float) + (length < b_length)
    # A pair that shifts too much is shortened, where both may be cut.
    short = ~fixed & (shift > 1.05 * goal)
    cuts = np.where(short, 2.0, cuts)
    reach = np.where(short, goal, shift)
    fits = (reach >= _LEAST * goal) & (reach <= 1.05 * goal)
    if not fits.any():
        fits = (reach > 0) & (reach < 1.9 * goal)
    if not fits.any():
        return False
    score = np.where(fits, np.abs(reach - goal) / goal + 0.2 * cuts, np.inf)
    i, j = np.unravel_index(int(score.argmin()), score.shape)
    count = int(length[i, j])
    first, last = int(b0[0, j]), int(a1[i, 0])
    if short[i, j]:
        count = _shortened(work, first, last, count, goal)
    if not count:
        return False
    gained = float(work.of(last - count, last))
    gained -= float(work.of(first, first + count))
    if gained <= 0:
        return False
    start, _, a_kept = high.items.pop(int(i))
    _, stop, b_kept = low.items.pop(int(j))
    high.items.append((first, first + count, b_kept))
    low.items.append((last - count, last, a_kept))
    if start < last - count:
        high.items.append((start, last - count, False))
    if first + count < stop:
        low.items.append((first + count, stop, False))
    return True


def _shortened(work: Work, first: int, last: int, longest: int, goal: float) -> int:
    """Tokens, a multiple of the block, whose exchange shifts about `goal`; 0 where none does."""
    counts = np.arange(0, longest + 1, BLOCK)
    shift = work.of(last - counts, np.full_like(counts, last))
    shift = shift - work.of(np.full_like(counts, first), first + counts)
    return int(counts[np.abs(shift - goal).argmin()])


def _give(high: Team, low: Team, work: Work, goal: float, most: int) -> int:
    """Moves the end of the heaviest run of `high` to `low`, at most `most` tokens; how many."""
    start, stop, whole = _columns(high)
    length = np.minimum(np.where(whole, stop - start, most // BLOCK * BLOCK), stop - start)
    gain = np.where(length <= most, work.of(stop - length, stop), -np.inf)
    fits = np.where(whole & (gain > 1.05 * goal), -np.inf, gain)
    index = int(fits.argmax())
    if not fits[index] > 0:
        return 0
    count, last = int(length[index]), int(stop[index])
    if gain[index] > goal and not whole[index]:
        counts = np.arange(0, count + 1, BLOCK)
        shift = work.of(last - counts, np.full_like(counts, last))
        count = int(counts[np.abs(shift - goal).argmin()])
    if not count:
        return 0
    begin, _, kept = high.items.pop(index)
    low.items.append((last - count, last, kept))
    if begin < last - count:
        high.items.append((begin, last - count, False))
    return count

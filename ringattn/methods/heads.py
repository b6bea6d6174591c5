"""Head parallelism as an outer composition: any inner plan, run on slices of the heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); with an inner ring, USP (arXiv 2405.07719) and
LoongTrain (arXiv 2406.18485). P = U * R ranks: the U ranks of a head group pool their tokens, and
each takes one slice of the heads; R such groups run the inner plan over the pooled shards.
Bytes received per rank for equal shards and U dividing Hkv: forward 2 u (Hq + Hkv) e (U-1)/U plus
4 n Hq (U-1)/U for lse; backward ((U-1)/U) [u (Hq (2e + g) + 2 Hkv (e + g)) + 8 n Hq]; plus the
inner plan's for U n rows and a slice of the heads.

Where U exceeds Hkv, key heads are replicated to the slices that need them, and their gradients are
summed on the way home. Slices may be uneven; where a slice's query heads do not map evenly onto its
key heads, it gets one copy of the key head per query head.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ringattn.errors import UserError
from ringattn.layout import Layout, join
from ringattn.methods.common import Problem, finish, halve, moves_of
from ringattn.methods.overlap import overlapped
from ringattn.schedule import Channel, Direction, Op, Schedule, Wire
from ringattn.tiles import SEGMENT

QUERY_SIDE = (Channel.Q, Channel.O, Channel.DQ)


@dataclass(frozen=True)
class Slice:
    """The heads of one member of a head group.

    q0, q1: query heads. kv: the key head of each head of its key slot.
    """

    q0: int
    q1: int
    kv: tuple[int, ...]

    def count(self, channel: int) -> int:
        """Heads of a slot of this member."""
        return self.q1 - self.q0 if channel in QUERY_SIDE else len(self.kv)


def head_slices(q_heads: int, kv_heads: int, degree: int) -> list[Slice]:
    """Near-equal slices of the query heads, with the key heads that each needs."""
    group = q_heads // kv_heads
    cuts = [q_heads * i // degree for i in range(degree + 1)]
    slices = []
    for a, b in pairwise(cuts):
        needed = [h // group for h in range(a, b)]
        kv = tuple(sorted(set(needed)))
        even = (b - a) % len(kv) == 0 and all(
            kv[i // ((b - a) // len(kv))] == head for i, head in enumerate(needed)
        )
        slices.append(Slice(a, b, kv if even else tuple(needed)))
    return slices


@dataclass(frozen=True)
class Grid:
    """Which rank is which member of which head group.

    heads_first: the members of a head group are consecutive ranks; else the context ranks are.
    """

    degree: int
    groups: int
    heads_first: bool

    def member(self, rank: np.ndarray) -> np.ndarray:
        """Place in the head group."""
        return rank % self.degree if self.heads_first else rank // self.groups

    def group(self, rank: np.ndarray) -> np.ndarray:
        """Which head group, which is the rank in the inner plan."""
        return rank // self.degree if self.heads_first else rank % self.groups

    def rank(self, member: np.ndarray | int, group: np.ndarray) -> np.ndarray:
        """The rank at a place."""
        if self.heads_first:
            return group * self.degree + member
        return member * self.groups + group


def check_degree(problem: Problem, degree: int) -> None:
    """Raises UserError where the heads cannot be shared by `degree` ranks."""
    if degree < 1 or problem.world % degree or degree > problem.shapes.q_heads:
        raise UserError(
            f"head-parallel degree u={degree}",
            f"must divide the {problem.world} ranks and be at most the "
            f"{problem.shapes.q_heads} query heads",
            'pass options={"u": ...}, or a method without head parallelism',
        )


def compose(
    problem: Problem,
    direction: Direction,
    method: str,
    inner: Callable[[Problem], Schedule],
    degree: int,
    *,
    heads_first: bool = True,
    ranges: np.ndarray | None = None,
    private: np.ndarray | None = None,
    overlap: bool = False,
) -> Schedule:
    """Plans one direction: pool tokens and split heads, run `inner`, go home.

    Pure host work; every rank builds the same schedule.

    Args:
        problem: over all ranks.
        direction, method: of the schedule.
        inner: plans the same direction over the head groups.
        degree: U.
        heads_first: the members of a head group are consecutive ranks.
        ranges: the part of the layout that is pooled; all of it by default.
        private: tasks on home slots beside it; they hide the way there and back.
        overlap: heads that start later come a step later, and those done earlier go a step earlier.
    """
    check_degree(problem, degree)
    if degree == 1:
        return replace(inner(problem), key=f"{method}:{problem.mask.key}:{problem.layout.key}")
    grid = Grid(degree, problem.world // degree, heads_first)
    part = "all" if ranges is None else hashlib.sha256(ranges.tobytes()).hexdigest()
    name = f"pooled {degree} {heads_first} {part}"
    posed, rows = problem.once(name, lambda: _posed(problem, grid, ranges))
    posed = posed.with_options(problem.options, problem.wire)
    core = inner(posed)
    slices = head_slices(problem.shapes.q_heads, problem.shapes.kv_heads, degree)
    tasks = np.concatenate([_tasks(core, grid, u, s) for u, s in enumerate(slices)])
    last = core.nsteps + 1
    moves = [_moves(problem, core, grid, u, s) for u, s in enumerate(slices)]
    results = (Channel.O,) if direction == "forward" else (Channel.DQ, Channel.DKV)
    for u, part in enumerate(slices):
        for channel in (Channel.Q, Channel.K):
            moves.append(_spread(problem, grid, rows, u, part, channel))
        for channel in results:
            moves.append(_collect(problem, grid, rows, u, part, channel, last))
    if private is not None:
        tasks = np.concatenate([tasks, halve(private, last)])
    table = np.concatenate(moves)
    if overlap:
        table = overlapped(tasks, table, last, problem.world, problem.shapes.q_heads)
    return finish(problem, direction, method, tasks, table)


def _posed(problem: Problem, grid: Grid, ranges: np.ndarray | None) -> tuple[Problem, np.ndarray]:
    """The problem over head groups, and each range's first row in its group's pooled shard."""
    pooled, rows = _pool(problem.layout, grid, problem.layout.ranges if ranges is None else ranges)
    degree = grid.degree if grid.heads_first else 1
    per_node = max(problem.ranks_per_node // degree, 1)
    return replace(problem, layout=pooled, ranks_per_node=min(per_node, grid.groups)), rows


def _pool(layout: Layout, grid: Grid, ranges: np.ndarray) -> tuple[Layout, np.ndarray]:
    """The layout over head groups, and each range's first row in its group's pooled shard.

    Pooled rows are ordered by global position, so that neighbouring ranges join.
    """
    group = grid.group(ranges["owner"])
    order = np.lexsort((ranges["start"], group))
    count = ((ranges["stop"] - ranges["start"]) // ranges["step"])[order]
    end = np.cumsum(count)
    first = np.searchsorted(group[order], group[order], side="left")
    begin = np.empty(len(ranges), dtype=np.int64)
    begin[order] = end - count - (end - count)[first] if len(ranges) else 0
    table = ranges[order]
    table["owner"], table["offset"] = group[order], begin[order]
    pooled = Layout(layout.seq_len, grid.groups, f"{layout.name}/{grid.degree}", join(table))
    rows = np.zeros(len(ranges), dtype=SEGMENT)
    rows["owner"], rows["offset"], rows["start"] = ranges["owner"], ranges["offset"], begin
    rows["stop"] = begin + (ranges["stop"] - ranges["start"]) // ranges["step"]
    return pooled, rows


def _tasks(core: Schedule, grid: Grid, member: int, part: Slice) -> np.ndarray:
    """The inner tasks of one member: one step later, slots moved up by one, its heads."""
    tasks = core.tasks.copy()
    tasks["rank"] = grid.rank(member, tasks["rank"])
    tasks["step"] += 1
    for name in ("qslot", "kslot", "oslot", "gslot"):
        tasks[name] += 1
    # Inner tasks may be of some heads only: their share of the slice's heads.
    for name in ("h0", "h1"):
        tasks[name] = tasks[name] * (part.q1 - part.q0) // core.shapes.q_heads
    return tasks[tasks["h0"] < tasks["h1"]]


def _moves(problem: Problem, core: Schedule, grid: Grid, member: int, part: Slice) -> np.ndarray:
    """The inner moves of one member."""
    moves = core.moves.copy()
    for name in ("src", "dst"):
        moves[name] = grid.rank(member, moves[name])
    for name in ("post", "land", "sslot", "dslot"):
        moves[name] += 1
    counts = np.array([part.count(channel) for channel in Channel])
    moves["nheads"] = counts[moves["channel"]]
    moves["lane"] = problem.lanes(moves["src"], moves["dst"])
    return moves


def _runs(part: Slice, channel: Channel) -> list[tuple[int, int, int]]:
    """(home head, slice head, heads) of the runs in which a slice's heads travel."""
    if channel in QUERY_SIDE:
        return [(part.q0, 0, part.q1 - part.q0)]
    runs: list[tuple[int, int, int]] = []
    for index, head in enumerate(part.kv):
        if runs and head == runs[-1][0] + runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((head, index, 1))
    return runs


def _spread(
    problem: Problem, grid: Grid, rows: np.ndarray, member: int, part: Slice, channel: Channel
) -> np.ndarray:
    """Home rows of all ranks of each group to one member, its heads only."""
    parts = []
    for home, own, count in _runs(part, channel):
        moves = moves_of(
            problem, len(rows), post=0, src=rows["owner"],
            dst=grid.rank(member, grid.group(rows["owner"])), channel=channel, dslot=1,
            s0=rows["offset"], d0=rows["start"], rows=rows["stop"] - rows["start"],
            sh=home, dh=own, op=Op.SET, dtype=Wire.INPUT,
        )  # fmt: skip
        moves["nheads"] = count
        parts.append(moves)
    return np.concatenate(parts)


def _collect(
    problem: Problem,
    grid: Grid,
    rows: np.ndarray,
    member: int,
    part: Slice,
    channel: Channel,
    step: int,
) -> np.ndarray:
    """One member's results home. The output is final, so it travels in the input dtype."""
    parts = []
    for home, own, count in _runs(part, channel):
        moves = moves_of(
            problem, len(rows), post=step, src=grid.rank(member, grid.group(rows["owner"])),
            dst=rows["owner"], channel=channel, sslot=1, s0=rows["start"], d0=rows["offset"],
            rows=rows["stop"] - rows["start"], sh=own, dh=home, op=Op.ADD, take=0,
            dtype=Wire.INPUT if channel == Channel.O else problem.wire,
        )  # fmt: skip
        moves["nheads"] = count
        parts.append(moves)
    return np.concatenate(parts)

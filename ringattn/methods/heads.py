"""Head parallelism as an outer composition: any inner plan, run on slices of the heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); with an inner ring, USP (arXiv 2405.07719) and
LoongTrain (arXiv 2406.18485). P = U * R ranks: the U ranks of a head group pool their tokens, and
each takes one slice of the heads; R such groups run the inner plan over the pooled shards.
Bytes received per rank for equal shards and U dividing Hkv: forward 2 u (Hq + Hkv) e (U-1)/U plus
4 n Hq (U-1)/U for lse; backward ((U-1)/U) [u (Hq (2e + g) + 2 Hkv (e + g)) + 8 n Hq]; plus the
inner plan's for U n rows and a slice of the heads.

With the option "save" the forward keeps each slice's q, k and v for the backward, which then
receives ((U-1)/U) [u (Hq (e + g) + 2 Hkv g) + 8 n Hq]: as the forward where g = e, but for lse and
delta. It costs u (Hq + 2 Hkv) e more bytes per layer from forward to backward.

Where U exceeds Hkv, key heads are replicated to the slices that need them, and their gradients are
summed on the way home. Slices may be uneven; where a slice's query heads do not map evenly onto its
key heads, it gets one copy of the key head per query head.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from ringattn.blocks import restricted_area
from ringattn.errors import UserError
from ringattn.layout import Layout, join
from ringattn.methods.common import Problem, finish, halve, moves_of
from ringattn.methods.head_groups import QUERY_SIDE, Generator, per_head_group
from ringattn.methods.overlap import overlapped
from ringattn.schedule import Channel, Direction, Op, Schedule, Wire
from ringattn.tiles import SEGMENT

SAVED = ((int(Channel.Q), 1), (int(Channel.K), 1))  # the pooled tokens of a slice's heads


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


def head_slices(
    q_heads: int, kv_heads: int, degree: int, work: np.ndarray | None = None
) -> list[Slice]:
    """Slices of the query heads, with the key heads that each needs.

    Near-equal in number, or in `work` (one figure per query head) where it is given.
    """
    group = q_heads // kv_heads
    cuts = [q_heads * i // degree for i in range(degree + 1)]
    if work is not None and work.sum():
        below = np.concatenate([[0], np.cumsum(work)]) / work.sum()
        for i in range(1, degree):
            nearest = int(np.abs(below - i / degree).argmin())
            cuts[i] = min(max(nearest, cuts[i - 1] + 1), q_heads - (degree - i))
    slices = []
    for a, b in pairwise(cuts):
        needed = [h // group for h in range(a, b)]
        kv = tuple(sorted(set(needed)))
        even = (b - a) % len(kv) == 0 and all(
            kv[i // ((b - a) // len(kv))] == head for i, head in enumerate(needed)
        )
        slices.append(Slice(a, b, kv if even else tuple(needed)))
    return slices


def _head_work(problem: Problem) -> np.ndarray | None:
    """Mask area of each query head, or None where all are alike."""
    mask = problem.mask
    if mask.is_uniform:
        return None
    area = np.bincount(mask.group, weights=restricted_area(mask), minlength=len(mask.heads))
    return np.repeat(area, mask.head_counts(problem.shapes.q_heads))


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
    inner: Generator,
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
    inner = per_head_group(inner)
    if degree == 1:
        return replace(inner(problem), key=f"{method}:{problem.mask.key}:{problem.layout.key}")
    shapes = problem.shapes
    grid = Grid(degree, problem.world // degree, heads_first)
    part = "all" if ranges is None else hashlib.sha256(ranges.tobytes()).hexdigest()
    name = f"pooled {degree} {heads_first} {part}"
    posed, rows = problem.once(name, lambda: _posed(problem, grid, ranges))
    slices = head_slices(shapes.q_heads, shapes.kv_heads, degree, _head_work(problem))
    cores = _cores(problem, posed, inner, slices)
    tasks = [_tasks(core, grid, u, s) for u, (core, s) in enumerate(zip(cores, slices))]
    moves = [_moves(problem, core, grid, u) for u, core in enumerate(cores) if len(core.moves)]
    last = max(core.nsteps for core in cores) + 1
    results = (Channel.O,) if direction == "forward" else (Channel.DQ, Channel.DKV)
    saved = SAVED if problem.options.get("save", 0) else ()
    starts_from = saved if direction == "backward" else ()
    for channel in (Channel.Q, Channel.K):
        spread = _spread(problem, grid, rows, slices, channel)
        if (channel, 1) in starts_from:  # q, k and v are there; dout, lse and delta are not
            spread = spread[:0] if channel == Channel.K else spread
            spread["skip"] = 1
        moves.append(spread)
    moves += [_collect(problem, grid, rows, slices, channel, last) for channel in results]
    if private is not None:
        tasks.append(halve(private, last))
    task_table, move_table = np.concatenate(tasks), np.concatenate(moves)
    if overlap:
        move_table = overlapped(task_table, move_table, last, problem.world, shapes.q_heads)
    counts = np.array([[part.count(channel) for channel in Channel] for part in slices])
    slot_heads = counts[grid.member(np.arange(problem.world))]
    return finish(problem, direction, method, task_table, move_table, slot_heads, saved)


def _cores(
    problem: Problem, posed: Problem, inner: Generator, slices: list[Slice]
) -> list[Schedule]:
    """The inner plan of each slice; slices with equal heads and masks share one."""
    made: dict[str, Schedule] = {}
    cores = []
    for part in slices:
        q0, q1, kv_heads = part.q0, part.q1, len(part.kv)
        # All heads are alike under one mask: which ones they are does not matter.
        name = f"{q1 - q0} {kv_heads}" if posed.mask.is_uniform else f"{q0} {q1} {kv_heads}"
        if name not in made:
            own = posed.once(f"heads {name}", partial(posed.for_heads, q0, q1, kv_heads))
            made[name] = inner(own.with_options(problem.options, problem.wire))
        cores.append(made[name])
    return cores


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
    """The inner tasks of one member: one step later, slots moved up by one."""
    tasks = core.tasks.copy()
    tasks["rank"] = grid.rank(member, tasks["rank"])
    tasks["step"] += 1
    tasks["head"] += part.q0
    for name in ("qslot", "kslot", "oslot", "gslot"):
        tasks[name] += 1
    return tasks


def _moves(problem: Problem, core: Schedule, grid: Grid, member: int) -> np.ndarray:
    """The inner moves of one member."""
    moves = core.moves.copy()
    for name in ("src", "dst"):
        moves[name] = grid.rank(member, moves[name])
    for name in ("post", "land", "sslot", "dslot"):
        moves[name] += 1
    moves["lane"] = problem.lanes(moves["src"], moves["dst"])
    return moves


def _runs(slices: list[Slice], channel: Channel) -> np.ndarray:
    """Rows (member, home head, slice head, heads) of the runs in which slices' heads travel."""
    runs: list[list[int]] = []
    for member, part in enumerate(slices):
        if channel in QUERY_SIDE:
            runs.append([member, part.q0, 0, part.q1 - part.q0])
            continue
        for index, head in enumerate(part.kv):
            last = runs[-1] if runs else [-1, 0, 0, 0]
            if index and last[0] == member and head == last[1] + last[3]:
                last[3] += 1
            else:
                runs.append([member, head, index, 1])
    return np.array(runs, dtype=np.int64).reshape(-1, 4)


def _spread(
    problem: Problem, grid: Grid, rows: np.ndarray, slices: list[Slice], channel: Channel
) -> np.ndarray:
    """Home rows of all ranks of each group to its members, each one's heads."""
    member, home, own, heads, at = _pairs(slices, channel, rows)
    moves = moves_of(
        problem, len(at), post=0, src=at["owner"], dst=grid.rank(member, grid.group(at["owner"])),
        channel=channel, dslot=1, s0=at["offset"], d0=at["start"], rows=at["stop"] - at["start"],
        sh=home, dh=own, op=Op.SET, dtype=Wire.INPUT,
    )  # fmt: skip
    moves["nheads"] = heads
    return moves


def _collect(
    problem: Problem,
    grid: Grid,
    rows: np.ndarray,
    slices: list[Slice],
    channel: Channel,
    step: int,
) -> np.ndarray:
    """The members' results home. The output is final, so it travels in the input dtype."""
    member, home, own, heads, at = _pairs(slices, channel, rows)
    moves = moves_of(
        problem, len(at), post=step, src=grid.rank(member, grid.group(at["owner"])),
        dst=at["owner"], channel=channel, sslot=1, s0=at["start"], d0=at["offset"],
        rows=at["stop"] - at["start"], sh=own, dh=home, op=Op.ADD, take=0,
        dtype=Wire.INPUT if channel == Channel.O else problem.wire,
    )  # fmt: skip
    moves["nheads"] = heads
    return moves


def _pairs(
    slices: list[Slice], channel: Channel, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every run of heads with every range: member, home head, slice head, heads, and the range."""
    rows = rows[rows["stop"] > rows["start"]]
    runs = np.repeat(_runs(slices, channel), len(rows), axis=0)
    member, home, own, heads = runs.T
    return member, home, own, heads, np.tile(rows, len(runs) // max(len(rows), 1))

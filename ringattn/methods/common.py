"""What every plan generator needs: the problem, local and remote tiles, tasks, finishing."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import Column
from ringattn.block_tiles import piece_area, see
from ringattn.layout import Layout
from ringattn.mask import ANY
from ringattn.masks import Mask
from ringattn.schedule import (
    MOVE,
    TASK,
    Channel,
    Direction,
    Lane,
    Schedule,
    Shapes,
    Wire,
    bands_of,
    compact,
    derive_slots,
    set_bands,
)

NONE = 1 << 40  # no row: above every row number
BLOCK = 128  # rows or keys that a kernel handles at once
_TILES = ("pieces", "q_rank", "k_rank")  # of a problem: neither options nor heads change them
_SLOTS = 1 << 20  # more than any slot number
_ROWS = 1 << 41  # more than any row number
UNKNOWN = -1  # area of a part of a block tile, until `finish` counts it
EDGE = BLOCK // 2  # pairs it wastes on average per row and column of a tile


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything a plan depends on. Ranks that hold equal problems build equal plans.

    Attributes:
        mask, layout: what attends what, and who owns what.
        shapes: heads, head dims, item sizes.
        ranks_per_node: consecutive ranks that share a node; decides the lane of a move.
        wire: dtype in which partial results and gradients travel.
        options: method-specific settings, e.g. {"stages": 4}.
    """

    mask: Mask
    layout: Layout
    shapes: Shapes
    ranks_per_node: int
    wire: Wire = Wire.ACCUMULATOR
    options: dict[str, int] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return self.layout.world

    @cached_property
    def pieces(self) -> np.ndarray:
        """Tiles of all (query rank, key rank) pairs in shard rows, dtype `ringattn.tiles.PIECE`."""
        return see(self.mask, self.layout.ranges, self.layout.ranges)

    @cached_property
    def q_rank(self) -> np.ndarray:
        """Owner of the query rows of each piece."""
        return self.layout.ranges["owner"][self.pieces["qseg"]]

    @cached_property
    def k_rank(self) -> np.ndarray:
        """Owner of the key rows of each piece."""
        return self.layout.ranges["owner"][self.pieces["kseg"]]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once for both directions and for other options and
        wires; nobody may write to it. The name tells all options that it depends on."""
        made = vars(self).setdefault("_made", {})
        if name not in made:
            made[name] = make()
        return made[name]

    def with_options(self, options: dict[str, int], wire: Wire | None = None) -> "Problem":
        """The same problem with other settings; tables that are made already are shared."""
        wire = self.wire if wire is None else wire
        if options == self.options and wire == self.wire:
            return self
        vars(self).setdefault("_made", {})
        other = replace(self, options=options, wire=wire)
        vars(other).update({n: vars(self)[n] for n in (*_TILES, "_made") if n in vars(self)})
        return other

    def for_heads(self, q0: int, q1: int, kv_heads: int) -> "Problem":
        """The problem of query heads [q0, q1) alone, on `kv_heads` key heads."""
        shapes = replace(self.shapes, q_heads=q1 - q0, kv_heads=kv_heads)
        if self.mask.heads != (ANY,):  # one group may say how many heads it is for, too
            mask = self.mask.for_heads(self.shapes.q_heads, q0, q1)
            return replace(self, shapes=shapes, mask=mask)
        other = replace(self, shapes=shapes)
        vars(other).update({name: getattr(self, name) for name in _TILES})
        return other

    def lanes(self, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """The lane of moves between ranks."""
        same = src // self.ranks_per_node == dst // self.ranks_per_node
        return np.where(same, Lane.INTRA, Lane.INTER)


def tasks_of(
    problem: Problem, pieces: np.ndarray, rank: Column, step: Column = 0, **slots: Column
) -> np.ndarray:
    """Tasks that compute these tiles for all heads that the mask gives them; scalars are broadcast.

    `slots` may give qslot, kslot, oslot and gslot; home (0) where it does not.
    """
    tasks, mask = np.zeros(len(pieces), dtype=TASK), problem.mask
    set_bands(tasks, pieces)
    first, last = mask.band_heads(problem.shapes.q_heads)
    tasks["h0"], tasks["h1"] = first[pieces["band"]], last[pieces["band"]]
    tasks["head"], tasks["matrix"] = tasks["h0"], mask.matrix[pieces["band"]]
    for name in ("area", "q_token", "k_token", "pitch"):
        tasks[name] = pieces[name]
    tasks["rank"], tasks["step"] = rank, step
    for name, slot in slots.items():
        tasks[name] = slot
    return tasks


def moves_of(problem: Problem, count: int, **columns) -> np.ndarray:
    """Moves of all heads of a channel with the given columns; empty ones are dropped.

    `s0` also serves as `d0`, `post` as `land`, where the other is not given.
    """
    moves = np.zeros(count, dtype=MOVE)
    for name, value in columns.items():
        moves[name] = value
    if "land" not in columns:
        moves["land"] = moves["post"]
    if "d0" not in columns:
        moves["d0"] = moves["s0"]
    heads = np.array([problem.shapes.heads(c) for c in range(5)])
    moves["nheads"] = heads[moves["channel"]]
    moves["lane"] = problem.lanes(moves["src"], moves["dst"])
    return moves[moves["rows"] > 0]


@dataclass(frozen=True)
class Hulls:
    """First and last + 1 row of block b that place p needs, (P, P); empty where low >= high."""

    low: np.ndarray
    high: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Rows in each hull, 0 where nothing is needed."""
        return np.maximum(self.high - self.low, 0)


def hulls_of(
    problem: Problem, block: np.ndarray, place: np.ndarray, keep: np.ndarray, rows: str
) -> Hulls:
    """Hulls of the rows ("q" or "k") of the kept pieces, by (block, place)."""
    world = problem.world
    low = np.full((world, world), NONE, dtype=np.int64)
    high = np.zeros((world, world), dtype=np.int64)
    where = (block[keep], place[keep])
    np.minimum.at(low, where, problem.pieces[rows + "0"][keep])
    np.maximum.at(high, where, problem.pieces[rows + "1"][keep])
    return Hulls(low, high)


def halve(tasks: np.ndarray, late_step: int, *, by_heads: bool = False) -> np.ndarray:
    """Holds back about half of each rank's work until `late_step`, so that it hides the last moves.

    The cut lies between query rows that share no tile, where that leaves at least a quarter to
    either side; else, or on request, tiles are cut by heads, and those of a single head by rows.
    Both halves then write results of their own, which need no merge.
    """
    if not len(tasks):
        return tasks
    tasks = tasks[np.lexsort((tasks["q0"], tasks["rank"]))]
    work = tasks["area"] * (tasks["h1"] - tasks["h0"])
    row, good = _free_rows(tasks, work)
    rank = tasks["rank"]
    whole = good[rank] & (not by_heads)
    tasks["step"][whole & (tasks["q0"] >= row[rank])] = late_step
    many = ~whole & (tasks["h1"] - tasks["h0"] > 1)
    one = tasks[~whole & ~many]
    halves = cut_rows(one, np.full(len(one), 0.5)) + _cut_heads(tasks[many])
    for late in halves[1::2]:
        late["step"] = late_step
    return np.concatenate([tasks[whole], *halves])


def _free_rows(tasks: np.ndarray, work: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each rank (by number): the row nearest to the middle of its work that cuts no tile, and
    whether it leaves at least a quarter of the work to either side.

    tasks: sorted by rank and first row. work: of each task.
    """
    rank = tasks["rank"]
    total = np.bincount(rank, weights=work)
    before = np.cumsum(work) - work
    before -= before[np.searchsorted(rank, rank, side="left")]
    reach = np.maximum.accumulate(rank * NONE + tasks["q1"])
    free = np.concatenate([[False], reach[:-1] <= rank[1:] * NONE + tasks["q0"][1:]])
    off = np.where(free, np.abs(before - total[rank] / 2), np.inf)
    order = np.lexsort((off, rank))
    best = order[np.unique(rank, return_index=True)[1]]
    row, good = np.zeros(len(total), dtype=np.int64), np.zeros(len(total), dtype=bool)
    row[rank[best]] = tasks["q0"][best]
    good[rank[best]] = off[best] <= total[rank[best]] / 4
    return row, good


def _cut_heads(tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper half of each task's heads."""
    lower, upper = tasks.copy(), tasks.copy()
    lower["h1"] = upper["h0"] = (tasks["h0"] + tasks["h1"]) // 2
    upper["head"] += upper["h0"] - tasks["h0"]
    return lower, upper


def cut_rows(tasks: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each task by query rows so that the first part holds about `share` of its area."""
    bands, goal = bands_of(tasks), share * tasks["area"]
    rows = band_ops.ceil_div(bands["q1"] - bands["q0"], bands["step"])
    low, high = np.zeros_like(rows), rows.copy()
    for _ in range(int(rows.max(initial=1)).bit_length()):
        middle = (low + high) // 2
        less = band_ops.area(_rows_below(bands, middle)) < goal
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    # Kernels like tiles cut at multiples of their block.
    high = np.where(rows >= 4 * BLOCK, np.maximum(high // BLOCK, 1) * BLOCK, high)
    above = bands.copy()
    above["q0"] += high * bands["step"]
    return _with_bands(tasks, _rows_below(bands, high)), _with_bands(tasks, above)


def _rows_below(bands: np.ndarray, rows: np.ndarray) -> np.ndarray:
    part = bands.copy()
    part["q1"] = np.minimum(bands["q0"] + rows * bands["step"], bands["q1"])
    return part


def _with_bands(tasks: np.ndarray, bands: np.ndarray) -> np.ndarray:
    tight, keep = band_ops.tighten(bands)
    part = tasks[keep]
    set_bands(part, tight)
    part["area"][part["matrix"] >= 0] = UNKNOWN
    return part


def _spans(tasks: np.ndarray, axis: str) -> np.ndarray:
    return band_ops.ceil_div(tasks[axis + "1"] - tasks[axis + "0"], tasks["stride"])


def _taken(table: np.ndarray, order: np.ndarray) -> np.ndarray:
    """table[order]; rows of equal words are copied faster than records."""
    if not len(table):
        return table
    words = np.ascontiguousarray(table).view(np.int64).reshape(len(table), -1)
    return words.take(order, axis=0).view(table.dtype).reshape(-1)


def _task_order(tasks: np.ndarray, world: int) -> np.ndarray:
    """By step, rank, slot of keys and first row. Two joint keys sort faster than four."""
    where = (tasks["step"] * world + tasks["rank"]) * _SLOTS + tasks["kslot"]
    return np.lexsort((tasks["q0"], where))


def _move_order(moves: np.ndarray, world: int) -> np.ndarray:
    """By post, land, ranks, channel, slot and first row."""
    steps = int(moves["land"].max(initial=0)) + 1
    when = ((moves["post"] * steps + moves["land"]) * world + moves["src"]) * world + moves["dst"]
    return np.lexsort(
        (moves["sslot"] * _ROWS + moves["s0"], when * len(Channel) + moves["channel"])
    )


def finish(
    problem: Problem,
    direction: Direction,
    method: str,
    tasks: np.ndarray,
    moves: np.ndarray,
    slot_heads: np.ndarray | None = None,
    saved: tuple[tuple[int, int], ...] = (),
) -> Schedule:
    """Orders the tables, drops empty steps, sizes the slots, and seals the schedule.

    `slot_heads` holds the heads of slots beyond home by rank and channel, int64 (P, channels);
    by default all heads. `saved` is that of the schedule.
    """
    shapes, mask = problem.shapes, problem.mask
    for index in np.flatnonzero(tasks["area"] == UNKNOWN):
        tasks["area"][index] = piece_area(mask, tasks[index], bands_of(tasks[index : index + 1]))
    tasks["cost"] = tasks["area"] + EDGE * (_spans(tasks, "q") + _spans(tasks, "k"))
    nsteps = compact(tasks, moves)
    tasks = _taken(tasks, _task_order(tasks, problem.world))
    moves = _taken(moves, _move_order(moves, problem.world))
    for table in (tasks, moves):
        table.setflags(write=False)
    if slot_heads is None:
        slot_heads = np.tile([shapes.heads(c) for c in Channel], (problem.world, 1))
    return Schedule(
        direction=direction,
        world=problem.world,
        nsteps=nsteps,
        home_rows=problem.layout.sizes,
        tasks=tasks,
        moves=moves,
        slots=derive_slots(tasks, moves, slot_heads, direction),
        shapes=shapes,
        matrices=mask.matrices,
        saved=saved,
        key=f"{method}:{mask.key}:{problem.layout.key}",
    )

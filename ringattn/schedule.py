"""Schedules: the tables that one executor runs, counts, verifies, prices and draws.

A schedule is one direction (forward or backward) of attention over a layout. Steps are global:
in every step each rank posts the step's moves, computes the step's tasks, then applies the moves
that land. A move captures its source at `post` and writes its destination after the compute of
step `land`. Landings of a step: first every `take` clears its source accumulator (its payload is
already captured), then SETs, then ADDs, in table order. For channel O, ADD is the log-sum-exp
merge with identity (0, -inf); for dQ and dKV it is a sum.
"""

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal

import numpy as np

from ringattn.bands import BAND, BAND_FIELDS, area
from ringattn.kernels.block_matrix import BLOCK_TILE, BlockMatrix, BlockTiles
from ringattn.kernels.tiles import TILE

Direction = Literal["forward", "backward"]


class Channel(IntEnum):
    """What a slot holds. Forward: Q (q), K (k, v), O (out, lse). Backward: Q (q, dout, lse, delta),
    K (k, v), DQ (dq), DKV (dk, dv)."""

    Q = 0
    K = 1
    O = 2  # noqa: E741 - the field's name for the attention output
    DQ = 3
    DKV = 4


ACCUMULATORS = (Channel.O, Channel.DQ, Channel.DKV)  # channels of results, which are added up


class Op(IntEnum):
    """How a payload meets its destination rows."""

    SET = 0
    ADD = 1


class Wire(IntEnum):
    """In which dtype a payload's data travels; lse and delta always travel as accumulators."""

    INPUT = 0
    ACCUMULATOR = 1


class Lane(IntEnum):
    """Which link carries a move: inside a node or between nodes."""

    INTRA = 0
    INTER = 1


def _ints(*names: str) -> list[tuple[str, type]]:
    return [(name, np.int64) for name in names]


TASK = np.dtype(
    _ints(
        "step", "rank", "qslot", "kslot", "oslot", "gslot",
        "h0", "h1", "q0", "q1", "k0", "k1", "lo", "hi", "stride", "area",
        "matrix", "head", "q_token", "k_token", "pitch",
    )
    + [("cost", np.float64)]
)  # fmt: skip
MOVE = np.dtype(
    _ints(
        "post", "land", "src", "dst", "channel", "sslot", "s0", "dslot", "d0", "rows",
        "sh", "dh", "nheads", "skip", "op", "take", "dtype", "lane",
    )
)  # fmt: skip
SLOT = np.dtype(_ints("rank", "channel", "slot", "rows", "heads"))


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of one attention call that turn rows into bytes.

    Attributes:
        q_heads, kv_heads: Hq, Hkv.
        qk_dim, v_dim: head dims of q and k, and of v and out.
        itemsize: bytes of an input element. accumulator_itemsize: 4, or 8 for float64 inputs.
    """

    q_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    itemsize: int
    accumulator_itemsize: int

    def heads(self, channel: int) -> int:
        """Heads of a channel's home slot."""
        return self.kv_heads if channel in (Channel.K, Channel.DKV) else self.q_heads

    def row_bytes(self, channel: int, direction: Direction, wire: int, skip: int = 0) -> int:
        """Bytes of one row of one head of a payload, without its first `skip` tensors."""
        size = self.accumulator_itemsize if wire == Wire.ACCUMULATOR else self.itemsize
        qk, v, exact = self.qk_dim * size, self.v_dim * size, self.accumulator_itemsize
        tensors = {
            Channel.Q: (qk,) if direction == "forward" else (qk, v, exact, exact),
            Channel.K: (qk, v),
            Channel.O: (v, exact),
            Channel.DQ: (qk,),
            Channel.DKV: (qk, v),
        }
        return sum(tensors[Channel(channel)][skip:])


@dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """One direction of a plan, as data.

    Attributes:
        direction: "forward" or "backward".
        world: P ranks. nsteps: global steps.
        home_rows: tokens of each rank, (P,).
        tasks, moves, slots: tables of dtype `TASK`, `MOVE`, `SLOT`, in execution order. Slot 0 of a
            channel is the rank's own shard.
        shapes: what turns rows into bytes.
        matrices: block matrices that tasks name; a task of matrix -1 is a plain band.
        saved: (channel, slot) pairs of Q and K that the forward leaves and the backward starts
            from: q, k and v lie there already. Equal in both directions.
        key: mask, layout and method, for people and the digest.
    """

    direction: Direction
    world: int
    nsteps: int
    home_rows: np.ndarray
    tasks: np.ndarray
    moves: np.ndarray
    slots: np.ndarray
    shapes: Shapes
    matrices: tuple[BlockMatrix, ...] = ()
    saved: tuple[tuple[int, int], ...] = ()
    key: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that two ranks must agree on."""
        digest = hashlib.sha256(
            repr(
                (self.direction, self.world, self.nsteps, self.shapes, self.saved, self.key)
            ).encode()
        )
        for table in (self.home_rows, self.tasks, self.moves, self.slots):
            digest.update(np.ascontiguousarray(table).tobytes())
        return digest.hexdigest()

    @cached_property
    def payload_bytes(self) -> np.ndarray:
        """Bytes of each move (per batch element), local copies included; int64 (moves,)."""
        skips = range(int(self.moves["skip"].max(initial=0)) + 1)
        row = self.shapes.row_bytes
        table = np.array(
            [[[row(c, self.direction, w, k) for k in skips] for w in Wire] for c in Channel]
        )
        m = self.moves
        return m["rows"] * m["nheads"] * table[m["channel"], m["dtype"], m["skip"]]

    @cached_property
    def move_bytes(self) -> np.ndarray:
        """Bytes of each move on the wire, per batch element: 0 for local copies; int64 (moves,)."""
        return np.where(self.moves["src"] == self.moves["dst"], 0, self.payload_bytes)

    def saved_bytes(self, rank: int) -> int:
        """Bytes that a rank keeps from the forward for the backward, per batch element."""
        mine = self.slots[self.slots["rank"] == rank]
        kept = [s for s in mine if (int(s["channel"]), int(s["slot"])) in self.saved]
        row = self.shapes.row_bytes
        return sum(
            int(s["rows"] * s["heads"]) * row(int(s["channel"]), "forward", Wire.INPUT)
            for s in kept
        )

    def bytes(self, rank: int, lane: Lane | None = None) -> int:
        """Bytes that a rank receives per batch element, over one lane or over both."""
        mine = self.moves["dst"] == rank
        if lane is not None:
            mine &= self.moves["lane"] == lane
        return int(self.move_bytes[mine].sum())

    @cached_property
    def work(self) -> np.ndarray:
        """Mask area that each rank computes in each step, averaged over the query heads:
        a task of half of the heads counts half. float64 (P, nsteps)."""
        table = np.zeros((self.world, max(self.nsteps, 1)))
        heads = self.tasks["h1"] - self.tasks["h0"]
        np.add.at(table, (self.tasks["rank"], self.tasks["step"]), self.tasks["area"] * heads)
        return table / self.shapes.q_heads

    def peak_bytes(self, rank: int) -> int:
        """Bytes of slots beyond home and of messages in flight on a rank, per batch element."""
        mine = self.slots[(self.slots["rank"] == rank) & (self.slots["slot"] > 0)]
        total = 0
        for slot in mine:
            accumulates = slot["channel"] in ACCUMULATORS
            wire = Wire.ACCUMULATOR if accumulates else Wire.INPUT
            size = self.shapes.row_bytes(int(slot["channel"]), self.direction, wire)
            total += int(slot["rows"] * slot["heads"]) * size
        flight = np.zeros(self.nsteps + 1, dtype=np.int64)
        touching = (self.moves["src"] == rank) | (self.moves["dst"] == rank)
        np.add.at(flight, self.moves["post"][touching], self.move_bytes[touching])
        np.add.at(flight, self.moves["land"][touching] + 1, -self.move_bytes[touching])
        return total + int(np.cumsum(flight).max(initial=0))


def bands_of(tasks: np.ndarray) -> np.ndarray:
    """The tasks' tiles as bands over buffer rows. A task's `stride` is its band's `step`."""
    bands = np.empty(len(tasks), dtype=BAND)
    for name in BAND_FIELDS[:-1]:
        bands[name] = tasks[name]
    bands["step"] = tasks["stride"]
    return bands


def set_bands(tasks: np.ndarray, bands: np.ndarray) -> None:
    """Writes bands over buffer rows into the tasks' tile columns, with their areas."""
    for name in BAND_FIELDS[:-1]:
        tasks[name] = bands[name]
    tasks["stride"] = bands["step"]
    tasks["area"] = area(bands)


def tiles_of(tasks: np.ndarray) -> np.ndarray:
    """The tiles of plain tasks as kernels take them, dtype `ringattn.kernels.tiles.TILE`."""
    return _renamed(tasks[tasks["matrix"] < 0], TILE)


def block_tiles_of(tasks: np.ndarray, matrices: tuple[BlockMatrix, ...]) -> BlockTiles | None:
    """The tiles of tasks with block matrices, or None where there are none."""
    blocks = tasks[tasks["matrix"] >= 0]
    return BlockTiles(_renamed(blocks, BLOCK_TILE), matrices) if len(blocks) else None


def _renamed(tasks: np.ndarray, dtype: np.dtype) -> np.ndarray:
    tiles = np.empty(len(tasks), dtype=dtype)
    for name in dtype.names or ():
        tiles[name] = tasks["stride" if name == "step" else name]
    return tiles


def derive_slots(
    tasks: np.ndarray, moves: np.ndarray, heads: np.ndarray, direction: Direction
) -> np.ndarray:
    """Sizes of all slots beyond home, from the rows that tasks and moves touch.

    `heads` holds the heads of a slot by rank and channel, int64 (P, channels).
    """
    out, grad = (Channel.O, None) if direction == "forward" else (Channel.DQ, Channel.DKV)
    channel, end = moves["channel"], moves["rows"]
    uses = [
        (tasks["rank"], int(Channel.Q), tasks["qslot"], tasks["q1"]),
        (tasks["rank"], int(Channel.K), tasks["kslot"], tasks["k1"]),
        (tasks["rank"], int(out), tasks["oslot"], tasks["q1"]),
        (moves["src"], channel, moves["sslot"], moves["s0"] + end),
        (moves["dst"], channel, moves["dslot"], moves["d0"] + end),
    ]
    if grad is not None:
        uses.append((tasks["rank"], int(grad), tasks["gslot"], tasks["k1"]))
    count = 1 + max(int(slot.max(initial=0)) for _, _, slot, _ in uses)
    rows = np.zeros(len(heads) * len(Channel) * count, dtype=np.int64)
    for rank, at, slot, last in uses:
        np.maximum.at(rows, (rank * len(Channel) + at) * count + slot, last)
    rows.reshape(-1, count)[:, 0] = 0  # home is not listed
    used = np.flatnonzero(rows)
    table = np.zeros(len(used), dtype=SLOT)
    table["slot"], table["rows"] = used % count, rows[used]
    table["channel"] = used // count % len(Channel)
    table["rank"] = used // count // len(Channel)
    table["heads"] = heads[table["rank"], table["channel"]]
    return table


def compact(tasks: np.ndarray, moves: np.ndarray) -> int:
    """Renumbers steps in place so that no step is empty; returns the number of steps."""
    columns = tasks["step"], moves["post"], moves["land"]
    used = np.zeros(1 + max(int(c.max(initial=0)) for c in columns), dtype=bool)
    for column in columns:
        used[column] = True
    number = np.cumsum(used) - 1
    for column in columns:
        column[...] = number[column]
    return int(used.sum())

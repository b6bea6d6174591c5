"""Bounds of a schedule: every task and move stays inside slots that exist, and inputs are kept.

These are the rules that a schedule can break without a wrong sum: a tile that reaches beyond its
slot, queries that are added or taken away. Cheap, so that whoever runs a schedule checks it.
"""

from dataclasses import dataclass

import numpy as np

from ringattn.bands import Column
from ringattn.errors import PlanError
from ringattn.schedule import Channel, Op, Schedule

_SLOTS = 1 << 20  # more than any slot number
_CHANNELS = {
    "forward": (Channel.Q, Channel.K, Channel.O),
    "backward": (Channel.Q, Channel.K, Channel.DQ, Channel.DKV),
}
_OPERANDS = (Channel.Q, Channel.K)


def check_bounds(schedule: Schedule) -> None:
    """Checks ranks, steps, slots, rows and heads of all tasks and moves, and what moves may write.

    Queries and keys are the caller's tensors at home: no move lands on them. They are copied, never
    added or taken.

    Raises:
        PlanError: the first row that breaks a rule.
    """
    sizes = SlotSizes.of(schedule)
    _check_tasks(schedule, sizes)
    _check_moves(schedule, sizes)


@dataclass(frozen=True)
class SlotSizes:
    """Rows and heads of all slots, home too, sorted by key; ask `at`."""

    key: np.ndarray
    rows: np.ndarray
    heads: np.ndarray

    @classmethod
    def of(cls, schedule: Schedule) -> "SlotSizes":
        """Those of a schedule."""
        channels = np.array(_CHANNELS[schedule.direction], dtype=np.int64)
        rank, channel = (x.ravel() for x in np.indices((schedule.world, len(channels))))
        heads = np.array([schedule.shapes.heads(c) for c in channels], dtype=np.int64)
        slots = schedule.slots
        key = np.concatenate(
            [_key(rank, channels[channel], 0), _key(slots["rank"], slots["channel"], slots["slot"])]
        )
        order = np.argsort(key, kind="stable")
        rows = np.concatenate([schedule.home_rows[rank], slots["rows"]])
        heads = np.concatenate([heads[channel], slots["heads"]])
        return cls(key[order], rows[order], heads[order])

    def at(
        self, rank: np.ndarray, channel: Column, slot: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, heads) of slots. Raises PlanError for one that does not exist."""
        key = _key(rank, channel, slot)
        index = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        missing = np.flatnonzero((self.key[index] != key) | (slot < 0))
        if len(missing):
            first = int(missing[0])
            name = Channel(int(np.broadcast_to(channel, key.shape)[first])).name
            raise PlanError(
                f"rank {int(rank[first])}: slot {int(slot[first])} of {name} does not exist"
            )
        return self.rows[index], self.heads[index]


def _key(rank: np.ndarray, channel: Column, slot: Column) -> np.ndarray:
    return (np.asarray(rank) * len(Channel) + channel) * _SLOTS + slot


def _refuse(wrong: np.ndarray, table: str, what: str) -> None:
    """Raises for the first row where `wrong` holds."""
    if wrong.any():
        raise PlanError(f"{table} {int(np.flatnonzero(wrong)[0])} {what}")


def _outside(low: np.ndarray, high: np.ndarray, size: Column) -> np.ndarray:
    return (low < 0) | (low >= high) | (high > size)


def _check_tasks(schedule: Schedule, sizes: SlotSizes) -> None:
    tasks = schedule.tasks
    rank, step = tasks["rank"], tasks["step"]
    _refuse(_outside(rank, rank + 1, schedule.world), "task", "is for a rank that does not exist")
    _refuse(_outside(step, step + 1, schedule.nsteps), "task", "is outside the plan's steps")
    forward = schedule.direction == "forward"
    q_rows, q_heads = sizes.at(rank, Channel.Q, tasks["qslot"])
    k_rows, k_heads = sizes.at(rank, Channel.K, tasks["kslot"])
    o_rows, o_heads = sizes.at(rank, Channel.O if forward else Channel.DQ, tasks["oslot"])
    rows, heads = np.minimum(q_rows, o_rows), np.minimum(q_heads, o_heads)
    _refuse(q_heads % k_heads != 0, "task", "has query heads that its key heads do not divide")
    _refuse(_outside(tasks["q0"], tasks["q1"], rows), "task", "has rows beyond its slot")
    _refuse(_outside(tasks["h0"], tasks["h1"], heads), "task", "has heads beyond its slot")
    if not forward:
        g_rows, g_heads = sizes.at(rank, Channel.DKV, tasks["gslot"])
        last = (tasks["h1"] - 1) // (q_heads // k_heads)
        k_rows = np.minimum(k_rows, g_rows)
        _refuse(last >= g_heads, "task", "has key heads beyond its slot")
    _refuse(_outside(tasks["k0"], tasks["k1"], k_rows), "task", "has keys beyond its slot")


def _check_moves(schedule: Schedule, sizes: SlotSizes) -> None:
    moves = schedule.moves
    for end in ("src", "dst"):
        outside = _outside(moves[end], moves[end] + 1, schedule.world)
        _refuse(outside, "move", "is for a rank that does not exist")
    known = np.isin(moves["channel"], _CHANNELS[schedule.direction])
    _refuse(~known, "move", f"has a channel that a {schedule.direction} plan does not")
    places = (
        ("src", "sslot", "s0", "sh", "reads beyond its source slot"),
        ("dst", "dslot", "d0", "dh", "does not fit its destination slot"),
    )
    for end, slot, row, head, what in places:
        rows, heads = sizes.at(moves[end], moves["channel"], moves[slot])
        wrong = _outside(moves[row], moves[row] + moves["rows"], rows)
        wrong |= _outside(moves[head], moves[head] + moves["nheads"], heads)
        _refuse(wrong, "move", what)
    operand = np.isin(moves["channel"], _OPERANDS)
    _refuse(operand & (moves["take"] != 0), "move", "takes queries or keys away")
    _refuse(operand & (moves["op"] == Op.ADD), "move", "adds to queries or keys")
    home = operand & (moves["dslot"] == 0)
    _refuse(home, "move", "writes to the queries or keys at home, the caller's own tensors")

"""Slots of a random plan, used and reused as tightly as the rules of a schedule allow.

A life is one use of a rectangle of a slot: something fills it, tasks read or add to it, moves take
it away. Two lives may share cells when one is over before the other begins; what "over" means is
said here on its own, so that the verifier is held against a second statement of the rules.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ringattn.schedule import ACCUMULATORS, SLOT, Channel, Op

NEVER = 1 << 20  # later than any step
TRIES = 6  # places looked at before a new slot is opened
MAX_START = 12  # a life starts at most so far down a slot whose rows it may choose
Place = tuple[int, int, int]  # rank, channel, slot


@dataclass(eq=False)
class Life:
    """One use of rows [row, row + rows) and heads [head, head + heads) of a slot.

    Attributes:
        channel, owner, first: it stands for rows first, first + 1, ... of the owner's shard.
        head_map: actual head of each of its heads, in order.
        fills: (post, land, op) of moves that land in it.
        tasks: steps in which tasks read it (operands) or add to it (accumulators).
        leaves: (post, land) of moves that take it away.
        clears: whether those leave zeros behind.
        sparse: whether only some of its rows are filled.
    """

    channel: int
    owner: int
    first: int
    rows: int
    head_map: tuple[int, ...]
    head: int = 0
    row: int = 0
    place: Place = (0, 0, 0)
    fills: list[tuple[int, int, int]] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)
    leaves: list[tuple[int, int]] = field(default_factory=list)
    clears: bool = True
    sparse: bool = False

    @property
    def accumulates(self) -> bool:
        return self.channel in ACCUMULATORS

    @property
    def shift(self) -> int:
        """Slot row of a row of the owner's shard, minus that row."""
        return self.row - self.first

    def holds(self, first: int, rows: int) -> bool:
        """Whether it stands for these rows of the owner's shard."""
        whole = self.first <= first and first + rows <= self.first + self.rows
        return whole and not self.sparse

    def run_of(self, heads: range) -> int | None:
        """Slot head from which these actual heads follow each other, or None."""
        wanted = tuple(heads)
        for at in range(len(self.head_map) - len(wanted) + 1):
            if self.head_map[at : at + len(wanted)] == wanted:
                return self.head + at
        return None

    def is_sound(self) -> bool:
        """Whether it is filled before it is read, and complete before it leaves."""
        filled = max((land for _, land, _ in self.fills), default=-1)
        left = min((post for post, _ in self.leaves), default=NEVER)
        if not self.accumulates:
            return filled < min(*self.tasks, left, NEVER)
        sets = max((land for _, land, op in self.fills if op == Op.SET), default=-1)
        adds = [land for _, land, op in self.fills if op == Op.ADD]
        late = all(land >= sets for land in adds) and all(step > sets for step in self.tasks)
        return late and max(filled, *self.tasks, -1) < left

    def starts_clean(self) -> bool:
        """Whether SETs fill all of it, whatever was there before."""
        return bool(self.fills) and all(op == Op.SET for _, _, op in self.fills)

    def ends_before(self, other: "Life") -> bool:
        """Whether the other may begin in these cells once this one is over."""
        sets = [(p, land) for p, land, op in other.fills if op == Op.SET]
        if any(post > p for post, _ in self.leaves for p, _ in sets):
            return False  # captured while a SET is on its way
        if not self.accumulates:
            read = all(step < p for step in self.tasks for p, _ in sets)
            return read and all(end <= land for _, end in self.leaves for _, land in sets)
        if not self.clears and not other.starts_clean():
            return False
        end = max((land for _, land in self.leaves), default=NEVER)
        return all(step > end for step in other.tasks) and all(
            land >= end for _, land, _ in other.fills
        )

    def meets(self, other: "Life") -> bool:
        """Whether they share cells. Tasks count for all heads of their rows."""
        rows = self.row < other.row + other.rows and other.row < self.row + self.rows
        low, high = (
            max(self.head, other.head),
            min(self.head + len(self.head_map), other.head + len(other.head_map)),
        )
        return rows and bool(low < high or self.tasks or other.tasks)


class Memory:
    """All slots beyond home of all ranks, and the lives in them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.lives: dict[Place, list[Life]] = {}
        self.heads: dict[Place, int] = {}
        self._slots: dict[tuple[int, int], list[Place]] = {}
        self._rows_of: dict[tuple[int, int], list[Life]] = {}

    def all(self, channel: int, owner: int) -> list[Life]:
        """Lives that stand for rows of this owner."""
        return self._rows_of.get((channel, owner), [])

    def is_free(self, life: Life) -> bool:
        """Whether the life is sound and disturbs no other of its slot."""
        others = (o for o in self.lives[life.place] if o is not life and o.meets(life))
        return life.is_sound() and all(o.ends_before(life) or life.ends_before(o) for o in others)

    def add(self, life: Life, rank: int, heads: int, row: int | None = None) -> Life:
        """Puts a life into a slot of so many heads: where there is room, else into a new one."""
        slots = self._slots.setdefault((rank, life.channel), [])
        mine = [place for place in slots if self.heads[place] == heads]
        for _ in range(TRIES if mine and self.rng.random() < 0.9 else 0):
            life.place = mine[int(self.rng.integers(len(mine)))]
            life.row = int(self.rng.integers(MAX_START)) if row is None else row
            if self.is_free(life):
                break
        else:
            life.place = (rank, life.channel, 1 + len(slots))
            slots.append(life.place)
            life.row = int(self.rng.integers(MAX_START)) if row is None else row
            self.heads[life.place], self.lives[life.place] = heads, []
            assert self.is_free(life), f"a life that contradicts itself: {life}"
        self.lives[life.place].append(life)
        self._rows_of.setdefault((life.channel, life.owner), []).append(life)
        return life

    def extend(self, life: Life, change: Iterable[tuple[str, object]]) -> bool:
        """Adds events to a life if that disturbs nobody; leaves it as it was otherwise."""
        added = list(change)
        for name, event in added:
            getattr(life, name).append(event)
        if self.is_free(life):
            return True
        for name, event in added:
            getattr(life, name).remove(event)
        return False

    def table(self) -> np.ndarray:
        """Sizes of all slots, dtype `ringattn.schedule.SLOT`; some have a few rows to spare."""
        table = np.zeros(len(self.heads), dtype=SLOT)
        for row, (place, heads) in zip(table, self.heads.items(), strict=True):
            rows = max(life.row + life.rows for life in self.lives[place])
            rank, channel, slot = place
            values = (rank, Channel(channel), slot, rows + int(self.rng.integers(3)), heads)
            for name, value in zip(SLOT.names or (), values, strict=True):
                row[name] = value
        return table

"""Random routes of operands and results through random slots."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ringattn.methods.common import Problem
from ringattn.schedule import MOVE, Channel, Direction, Op, Wire
from tests.core.random_memory import Life, Memory


@dataclass(frozen=True)
class Side:
    """The queries or the keys of a tile on their way through its executor.

    Attributes:
        rank, owner: who computes, whose rows.
        first, rows: rows of the owner's shard, of which the tile needs those on its lattice.
        heads: actual ones.
        home: whether the operand, and whether the result, stays in the owner's home slot.
        hops: of the operand and of the result, where they travel.
    """

    operand: Channel
    result: Channel
    rank: int
    owner: int
    first: int
    rows: int
    lattice: range
    heads: range
    home: tuple[bool, bool]
    hops: tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A part of one hop's cargo: rows from the owner's row `first`, runs of heads, and its time."""

    first: int
    rows: int
    src_head: int
    dst_head: int
    heads: int
    post: int
    land: int


class Routes:
    """Collects the moves of one schedule, and what they do to every slot."""

    def __init__(self, problem: Problem, direction: Direction, rng: np.random.Generator) -> None:
        self.problem, self.rng = problem, rng
        self.direction: Direction = direction
        self.memory, self.nsteps = Memory(rng), int(rng.integers(7, 16))
        self._moves: list[tuple[int, ...]] = []
        self.partner: dict[Life, Life] = {}  # result that is collected beside an operand

    def operand(
        self, side: Side, step: int, width: int, head: int, head_map: tuple[int, ...]
    ) -> Life:
        """Where the executor finds an operand: at home, or in a slot that moves fill."""
        if side.home[0]:
            return self.home(side.operand, side.owner)
        last = Life(side.operand, side.owner, side.first, side.rows, head_map, head)
        last.tasks.append(step)
        last.sparse = side.hops[0] == 1 and side.lattice.step > 1 and bool(self.rng.random() < 0.5)
        route = [*(self._relay(side, side.operand) for _ in range(side.hops[0] - 1)), last]
        spans = self.spans(0, step, len(route))
        routed, here = [], self._source(side, spans[0])
        for there, span in zip(route, spans, strict=True):
            parts = self._parts(side, here, there, span, into=True)
            if there is not route[0]:
                here.leaves += [(p.post, p.land) for p in parts]
            elif not self._leave(here, parts):
                here = self.home(side.operand, side.owner)
                parts = self._parts(side, here, there, span, into=True)
            there.fills += [(p.post, p.land, int(Op.SET)) for p in parts]
            routed.append((here, there, parts))
            here = there
        self.place(route[:-1])
        self.memory.add(last, side.rank, width, side.first if any(side.home) else None)
        for here, there, parts in routed:
            self.emit(here, there, parts, Op.SET, take=False)
        return last

    def _leave(self, life: Life, parts: list[Part]) -> bool:
        """Whether a life may be captured once more, then."""
        if life.place[2] == 0:
            return True
        return self.memory.extend(life, [("leaves", (p.post, p.land)) for p in parts])

    def _source(self, side: Side, span: tuple[int, int]) -> Life:
        """Home, or someone who holds the rows in time."""
        home = self.home(side.operand, side.owner)
        lives = [
            life
            for life in self.memory.all(side.operand, side.owner)
            if life.holds(side.first, side.rows)
            and life.run_of(side.heads) is not None
            and max(land for _, land, _ in life.fills) < span[0]
        ]
        if not lives or self.rng.random() < 0.5:
            return home
        return lives[int(self.rng.integers(len(lives)))]

    def result(
        self, side: Side, step: int, operand: Life, width: int, head: int, head_map: tuple
    ) -> Life | None:
        """Where a task adds its result: at home, or in a partial that moves bring home."""
        if self.direction == "forward" and side.operand == Channel.K:
            return None
        if side.home[1]:
            return self.home(side.result, side.owner)
        old = self.partner.get(operand)
        shares = old and self._collects(old, side, head, head_map) and self.rng.random() < 0.8
        if old and shares and self.memory.extend(old, [("tasks", step)]):
            return old
        first = Life(side.result, side.owner, side.first, side.rows, head_map, head)
        first.tasks.append(step)
        route = [first, *(self._relay(side, side.result) for _ in range(side.hops[1] - 1))]
        for life in route:
            life.clears = bool(self.rng.random() < 0.8)
        spans = self.spans(step + 1, self.nsteps, len(route))
        goal = self._goal(side, spans[-1])
        routed = []
        for here, there, span in zip(route, [*route[1:], goal], spans, strict=True):
            parts = self._parts(side, here, there, span, into=False)
            op = self._op(here) if there is not goal else Op.ADD
            fills = [(p.post, p.land, int(op)) for p in parts]
            here.leaves += [(p.post, p.land) for p in parts]
            if there is not goal:
                there.fills += fills
            elif goal.place[2] and not self.memory.extend(goal, [("fills", f) for f in fills]):
                there = self.home(side.result, side.owner)
                parts = self._parts(side, here, there, span, into=False)
                here.leaves[:] = [(p.post, p.land) for p in parts]
            routed.append((here, there, parts, op))
        self.memory.add(first, side.rank, width, first.first + operand.shift)
        self.place(route[1:])
        for here, there, parts, op in routed:
            self.emit(here, there, parts, op, take=here.clears)
        if operand.place[2]:
            self.partner[operand] = first
        return first

    def _collects(self, life: Life, side: Side, head: int, head_map: tuple[int, ...]) -> bool:
        begin = head - life.head
        same = begin >= 0 and life.head_map[begin : begin + len(head_map)] == head_map
        return same and life.holds(side.first, side.rows)

    def _op(self, source: Life) -> Op:
        """How a partial enters a fresh place. A head that comes twice has to be added."""
        repeated = len(set(source.head_map)) < len(source.head_map)
        return Op.ADD if repeated or self.rng.random() < 0.5 else Op.SET

    def _goal(self, side: Side, span: tuple[int, int]) -> Life:
        """Home, or another partial of the same rows that leaves later."""
        home = self.home(side.result, side.owner)
        lives = [
            life
            for life in self.memory.all(side.result, side.owner)
            if life.holds(side.first, side.rows)
            and life.run_of(side.heads) is not None
            and min(post for post, _ in life.leaves) >= span[1]
        ]
        if not lives or self.rng.random() < 0.4:
            return home
        return lives[int(self.rng.integers(len(lives)))]

    def home(self, channel: Channel, owner: int) -> Life:
        rows, heads = int(self.problem.layout.sizes[owner]), self.problem.shapes.heads(channel)
        return Life(channel, owner, 0, rows, tuple(range(heads)), place=(owner, channel, 0))

    def _relay(self, side: Side, channel: Channel) -> Life:
        """A stop on the way, with the actual heads."""
        head = int(self.rng.integers(3))
        return Life(channel, side.owner, side.first, side.rows, tuple(side.heads), head)

    def place(self, relays: list[Life]) -> None:
        for life in relays:
            width = life.head + len(life.head_map) + int(self.rng.integers(2))
            self.memory.add(life, int(self.rng.integers(self.problem.world)), width)

    def spans(self, start: int, stop: int, count: int) -> list[tuple[int, int]]:
        """[start, stop) in `count` parts, none of them empty."""
        cuts = self.rng.choice(np.arange(start + 1, stop), count - 1, replace=False)
        edges = [start, *sorted(int(c) for c in cuts), stop]
        return list(pairwise(edges))

    def _parts(
        self, side: Side, here: Life, there: Life, span: tuple[int, int], *, into: bool
    ) -> list[Part]:
        """The cargo of one hop in parts by rows and heads, each at its own time in the span.

        `into` fills every head of the destination; otherwise every head of the source leaves.
        """
        parts = []
        for src, dst, heads in self._runs(here, there, into=into):
            for first, rows in self._cuts(side, there):
                post, land = sorted(int(t) for t in self.rng.integers(*span, 2))
                parts.append(Part(first, rows, src, dst, heads, post, land))
        return parts

    def _runs(self, here: Life, there: Life, *, into: bool) -> list[tuple[int, int, int]]:
        """(source head, destination head, heads) of runs that keep their order."""
        driver, other = (there, here) if into else (here, there)
        runs: list[list[int]] = []
        for index, actual in enumerate(driver.head_map):
            at = other.run_of(range(actual, actual + 1))
            assert at is not None
            pair = [at, driver.head + index] if into else [driver.head + index, at]
            last = runs[-1] if runs else None
            if last and [last[0] + last[2], last[1] + last[2]] == pair and self.rng.random() < 0.8:
                last[2] += 1
            else:
                runs.append([*pair, 1])
        return [(a, b, n) for a, b, n in runs]

    def _cuts(self, side: Side, there: Life) -> list[tuple[int, int]]:
        """Rows in one or two parts, or only those on the tile's lattice."""
        if there.sparse:
            return [(row, 1) for row in side.lattice]
        first, rows = side.first, side.rows
        cut = int(self.rng.integers(rows + 1)) if self.rng.random() < 0.3 else 0
        return [(f, n) for f, n in ((first, cut), (first + cut, rows - cut)) if n]

    def emit(self, here: Life, there: Life, parts: list[Part], op: int, *, take: bool) -> None:
        for part in parts:
            values = {
                "post": part.post, "land": part.land,
                "src": here.place[0], "dst": there.place[0], "channel": here.channel,
                "sslot": here.place[2], "s0": part.first + here.shift,
                "dslot": there.place[2], "d0": part.first + there.shift, "rows": part.rows,
                "sh": part.src_head, "dh": part.dst_head, "nheads": part.heads,
                "op": op, "take": take, "dtype": Wire(int(self.rng.integers(2))),
                "skip": 0, "lane": 0,
            }  # fmt: skip
            self._moves.append(tuple(int(values[name]) for name in MOVE.names or ()))

    def moves(self) -> np.ndarray:
        """The moves so far; most of them in the lane that the nodes give."""
        moves = np.array(self._moves, dtype=MOVE)
        lanes = self.problem.lanes(moves["src"], moves["dst"])
        moves["lane"] = np.where(self.rng.random(len(moves)) < 0.8, lanes, 1 - lanes)
        return moves

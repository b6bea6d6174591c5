"""Random plans: any tile on any rank at any step, its operands and results over any route.

No plan of a method looks like these. Every tile of the mask is cut at random rows, keys and heads
and given to the owner of its queries, the owner of its keys or a third rank. Its operands come in
one to three hops, whole or in parts, from home or from whoever holds them already; partial results
go home likewise, or into another partial on its way. Slots are packed at random rows, hold any
number of heads (key heads repeated where that fits), and are reused as soon as the rules allow.
"""

from collections.abc import Callable, Mapping

import numpy as np

from ringattn.methods.common import Problem
from ringattn.schedule import TASK, Channel, Direction, Schedule, compact
from tests.core.random_heads import Fit, fits
from tests.core.random_home import add_tour, set_some
from tests.core.random_memory import Life
from tests.core.random_routes import Routes, Side
from tests.core.random_tiles import random_tiles

Query = tuple[int, int]  # first head, heads of the slot
Key = tuple[int, Mapping[int, int]]  # heads of the slot, actual head by slot head


def random_schedule(problem: Problem, direction: Direction, rng: np.random.Generator) -> Schedule:
    """A valid schedule that no method would make. No SET lands on an output row at home, which may
    hold a sink from the start."""
    build = _Builder(problem, direction, rng)
    for tile, q_owner, k_owner in random_tiles(problem, rng):
        build.add_tile(tile, int(q_owner), int(k_owner))
    tasks = np.array([task.item() for task in build.tasks], dtype=TASK)
    for _ in range(int(rng.integers(4))):
        add_tour(build.routes, tasks)
    moves = build.routes.moves()
    if direction == "backward":
        set_some(moves, tasks, direction, rng)
    return _schedule(problem, build.routes, tasks, moves)


def _schedule(problem: Problem, routes: Routes, tasks: np.ndarray, moves: np.ndarray) -> Schedule:
    """The tables in an order that the rules leave open."""
    rng = routes.rng
    tasks, moves = rng.permutation(tasks), rng.permutation(moves)
    tasks["cost"] = tasks["area"]
    nsteps = compact(tasks, moves) if rng.random() < 0.5 else routes.nsteps
    return Schedule(
        direction=routes.direction,
        world=problem.world,
        nsteps=nsteps,
        home_rows=problem.layout.sizes,
        tasks=tasks[np.argsort(tasks["step"], kind="stable")],
        moves=moves[np.argsort(moves["post"], kind="stable")],
        slots=routes.memory.table(),
        shapes=problem.shapes,
        matrices=problem.mask.matrices,
        key=f"random:{problem.mask.key}:{problem.layout.key}",
    )


class _Builder:
    """Collects the tasks of one schedule."""

    def __init__(self, problem: Problem, direction: Direction, rng: np.random.Generator) -> None:
        self.problem, self.direction, self.rng = problem, direction, rng
        self.routes = Routes(problem, direction, rng)
        self.memory, self.nsteps = self.routes.memory, self.routes.nsteps
        self.tasks: list[np.ndarray] = []

    def add_tile(self, tile: np.ndarray, q_owner: int, k_owner: int) -> None:
        """Computes a tile somewhere, some time."""
        rng, shapes = self.rng, self.problem.shapes
        third = int(rng.integers(self.problem.world))
        rank = (q_owner, k_owner, third)[int(rng.integers(3))]
        heads = range(int(tile["h0"][0]), int(tile["h1"][0]))
        ratio = shapes.q_heads // shapes.kv_heads
        keys = range(heads.start // ratio, (heads.stop - 1) // ratio + 1)
        q = self._side("q", tile, rank, q_owner, heads)
        k = self._side("k", tile, rank, k_owner, keys)
        first = max(q.hops[0], k.hops[0])
        step = int(rng.integers(first, self.nsteps - max(q.hops[1], k.hops[1])))
        at_home = shapes.kv_heads, dict(enumerate(range(shapes.kv_heads)))
        query = (heads.start, shapes.q_heads) if any(q.home) else None
        key: Key | None = at_home if any(k.home) else None

        def ways(query: Query | None, key: Key | None) -> list[Fit]:
            return fits(heads, shapes.q_heads, shapes.kv_heads, query, key)

        def suits(life: Life) -> bool:
            if life.channel == Channel.K:
                return bool(ways(query, self._k_slot(life)))
            slot = self._q_slot(life, heads)
            return slot is not None and bool(ways(slot, key))

        old_q = None if query else self._find(q, step, suits)
        query = self._q_slot(old_q, heads) if old_q else query
        old_k = None if key else self._find(k, step, suits)
        key = self._k_slot(old_k) if old_k else key
        fit = self._choose(ways(query, key))
        q_life = old_q or self.routes.operand(q, step, fit.q_heads, fit.at, tuple(heads))
        k_life = old_k or self.routes.operand(k, step, fit.k_heads, fit.key_at, fit.keys)
        o_life = self.routes.result(q, step, q_life, fit.q_heads, fit.at, tuple(heads))
        g_life = self.routes.result(k, step, k_life, fit.k_heads, fit.key_at, fit.keys)
        task, slots = tile.copy(), zip("qkog", (q_life, k_life, o_life, g_life), strict=True)
        for name, life in slots:
            task[name + "slot"] = life.place[2] if life else 0
        task["rank"], task["step"] = rank, step
        task["h0"], task["h1"] = fit.at, fit.at + len(heads)
        for axis, life in (("q", q_life), ("k", k_life)):
            task[axis + "0"] += life.shift
            task[axis + "1"] += life.shift
            task[axis + "_token"] -= life.shift * task["pitch"]
        for bound in ("lo", "hi"):
            task[bound] += k_life.shift - q_life.shift
        self.tasks.append(task)

    def _side(self, axis: str, tile: np.ndarray, rank: int, owner: int, heads: range) -> Side:
        rng, forward = self.rng, self.direction == "forward"
        result = Channel.O if forward else Channel.DQ if axis == "q" else Channel.DKV
        size, extra = int(self.problem.layout.sizes[owner]), rng.integers(0, 3, 2)
        first = max(0, int(tile[axis + "0"][0] - extra[0]))
        last = min(size, int(tile[axis + "1"][0] + extra[1]))
        lattice = range(*(int(tile[name][0]) for name in (axis + "0", axis + "1", "stride")))
        here = rank == owner
        home = here and rng.random() < 0.7, here and rng.random() < 0.6
        hops = [1 + int(rng.integers(3) * rng.integers(2)) for _ in range(2)]
        if axis == "k" and forward:
            home, hops[1] = (home[0], home[0]), 0
        return Side(
            operand=Channel.Q if axis == "q" else Channel.K, result=result, rank=rank, owner=owner,
            first=first, rows=last - first, lattice=lattice, heads=heads, home=home,
            hops=(0 if home[0] else hops[0], 0 if home[1] else hops[1]),
        )  # fmt: skip

    def _choose(self, found: list[Fit]) -> Fit:
        """One of the ways; half of the time one with the heads of home: such slots are shared."""
        home = self.problem.shapes.q_heads, self.problem.shapes.kv_heads
        full = [f for f in found if (f.q_heads, f.k_heads) == home]
        choice = full if full and self.rng.random() < 0.5 else found
        return choice[int(self.rng.integers(len(choice)))]

    def _find(self, side: Side, step: int, suits: Callable[[Life], bool]) -> Life | None:
        """An operand that the executor holds at that step anyway, read once more."""
        if self.rng.random() < 0.4:
            return None
        lives = self.memory.all(side.operand, side.owner)
        for life in (lives[i] for i in self.rng.permutation(len(lives))):
            if (
                life.place[0] == side.rank
                and life.holds(side.first, side.rows)
                and suits(life)
                and self.memory.extend(life, [("tasks", step)])
            ):
                return life
        return None

    def _q_slot(self, life: Life, heads: range) -> Query | None:
        at = life.run_of(heads)
        return None if at is None else (at, self.memory.heads[life.place])

    def _k_slot(self, life: Life) -> Key:
        held = {life.head + index: actual for index, actual in enumerate(life.head_map)}
        return self.memory.heads[life.place], held

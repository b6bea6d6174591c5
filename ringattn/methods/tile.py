"""Tile grid: ranks form an a x b grid; a rank gathers the queries of a ranks and the keys of b.

Source: Mesh-Attention (2025), two-dimensional tiles per rank. Rank (x, y) computes the queries of
row y against the keys of column x, so every pair of shards meets on exactly one rank.
Bytes received per rank for equal shards and a full mask: forward
u [(a-1) Hq (e + w) + 2 (b-1) Hkv e] + 4 (a-1) n Hq, backward
(a-1) [u Hq (2e + g) + 8 n Hq] + 2 (b-1) u Hkv (e + g). The grid minimises these, for each
direction on its own; the option "tile_a" fixes a. One column of queries is the all-gathered ring.

Steps: the home queries meet the b key blocks as they arrive; then each visiting query block meets
all of them at once, while the next one arrives and the previous one's result goes home.
"""

from dataclasses import dataclass

import numpy as np

from ringattn.errors import UserError
from ringattn.methods.common import Problem, finish, halve, hulls_of, moves_of, tasks_of
from ringattn.schedule import MOVE, Channel, Direction, Op, Schedule, Shapes, Wire


@dataclass(frozen=True)
class _Grid:
    """a columns times b rows of ranks; consecutive ranks share a row, hence their queries."""

    a: int
    b: int

    def x(self, rank: np.ndarray) -> np.ndarray:
        return rank % self.a

    def y(self, rank: np.ndarray) -> np.ndarray:
        return rank // self.a


def _grid(problem: Problem, direction: Direction) -> _Grid:
    world, asked = problem.world, problem.options.get("tile_a", 0)
    if asked and world % asked:
        raise UserError(
            f"tile_a={asked}", f"must divide the {world} ranks", "pass a divisor, or leave it out"
        )
    choices = [asked] if asked else [a for a in range(1, world + 1) if world % a == 0]
    shapes, wire = problem.shapes, problem.wire
    return min(
        (_Grid(a, world // a) for a in choices), key=lambda g: _cost(g, shapes, direction, wire)
    )


def _cost(grid: _Grid, shapes: Shapes, direction: Direction, wire: Wire) -> int:
    """Bytes received per row of a shard, full mask."""

    def row(channel: Channel, dtype: Wire) -> int:
        return shapes.heads(channel) * shapes.row_bytes(channel, direction, dtype)

    if direction == "forward":
        queries = row(Channel.Q, Wire.INPUT) + row(Channel.O, wire)
        return (grid.a - 1) * queries + (grid.b - 1) * row(Channel.K, Wire.INPUT)
    queries = row(Channel.Q, Wire.INPUT) + row(Channel.DQ, wire)
    keys = row(Channel.K, Wire.INPUT) + row(Channel.DKV, wire)
    return (grid.a - 1) * queries + (grid.b - 1) * keys


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "forward")


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    return _plan(problem, "backward")


def _turn(offset: np.ndarray) -> np.ndarray:
    """Home for offset 0, then two buffers in turn."""
    return np.where(offset == 0, 0, 1 + (offset - 1) % 2)


def _plan(problem: Problem, direction: Direction) -> Schedule:
    grid = _grid(problem, direction)
    q_rank, k_rank = problem.q_rank, problem.k_rank
    place = grid.x(k_rank) + grid.a * grid.y(q_rank)
    visit = (grid.x(k_rank) - grid.x(q_rank)) % grid.a
    fetch = (grid.y(q_rank) - grid.y(k_rank)) % grid.b
    step = np.where(visit == 0, fetch, grid.b - 1 + visit)
    tasks = tasks_of(
        problem, problem.pieces, place, step,
        qslot=_turn(visit), kslot=fetch, oslot=_turn(visit), gslot=fetch,
    )  # fmt: skip
    queries, q_results = _query_moves(problem, grid, place, direction)
    keys, k_results = _key_moves(problem, grid, place, direction)
    returns = np.concatenate([q_results, k_results])
    late = int(returns["land"].max(initial=0))
    if late:
        home = (visit == 0) & (fetch == 0)
        tasks = np.concatenate([halve(tasks[home], late), tasks[~home]])
    return finish(problem, direction, "tile", tasks, np.concatenate([queries, keys, returns]))


def _query_moves(
    problem: Problem, grid: _Grid, place: np.ndarray, direction: Direction
) -> tuple[np.ndarray, np.ndarray]:
    """Visiting queries, one step ahead of their use, and their results, one step behind."""
    hulls = hulls_of(problem, problem.q_rank, place, problem.q_rank != place, "q")
    block, where = np.nonzero(hulls.rows)
    visit = (grid.x(where) - grid.x(block)) % grid.a
    step = grid.b - 1 + visit
    span = {"s0": hulls.low[block, where], "rows": hulls.rows[block, where]}
    there = moves_of(
        problem, len(block), post=step - 1, src=block, dst=where, channel=Channel.Q,
        dslot=_turn(visit), op=Op.SET, dtype=Wire.INPUT, **span,
    )  # fmt: skip
    result = Channel.O if direction == "forward" else Channel.DQ
    back = moves_of(
        problem, len(block), post=step + 1, src=where, dst=block, channel=result,
        sslot=_turn(visit), op=Op.ADD, take=1, dtype=problem.wire, **span,
    )  # fmt: skip
    return there, back


def _key_moves(
    problem: Problem, grid: _Grid, place: np.ndarray, direction: Direction
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the column, kept for all visiting queries, and in the backward their gradients."""
    hulls = hulls_of(problem, problem.k_rank, place, problem.k_rank != place, "k")
    block, where = np.nonzero(hulls.rows)
    fetch = (grid.y(where) - grid.y(block)) % grid.b
    span = {"s0": hulls.low[block, where], "rows": hulls.rows[block, where]}
    there = moves_of(
        problem, len(block), post=fetch - 1, src=block, dst=where, channel=Channel.K,
        dslot=fetch, op=Op.SET, dtype=Wire.INPUT, **span,
    )  # fmt: skip
    if direction == "forward":
        return there, np.empty(0, dtype=MOVE)
    done = fetch + 1 if grid.a == 1 else grid.a + grid.b - 1
    back = moves_of(
        problem, len(block), post=done, src=where, dst=block, channel=Channel.DKV,
        sslot=fetch, op=Op.ADD, take=1, dtype=problem.wire, **span,
    )  # fmt: skip
    return there, back

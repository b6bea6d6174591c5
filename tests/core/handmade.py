"""A plan that neither ring nor direct makes: queries travel to the keys, results come home.

It uses what those two leave out of a schedule: moves of Q, O and dQ, local copies (src = dst), a
SET and ADDs that land on the same rows in one step, and head ranges on moves and tasks.

Forward, step 0: every rank's queries go to every other rank, half of the heads per move; local
tasks fill a partial in slot 1 + rank. Step 1: the visiting queries are computed. At the end of
step 1 or 2 the local partial and the visiting ones are merged at home (ADD), which may hold a sink.
The backward is the same with dO, lse and delta beside the queries, but that the local partial of dQ
is copied home (SET); dK and dV stay at home.
"""

import numpy as np

import ringattn as ra
from ringattn import Layout, Mask
from ringattn.methods.common import Problem, finish, moves_of, tasks_of
from ringattn.schedule import Channel, Direction, Op, Schedule, Wire


def travelling_queries(problem: Problem, direction: Direction) -> Schedule:
    """The schedule of one direction."""
    out = Channel.O if direction == "forward" else Channel.DQ
    local = problem.q_rank == problem.k_rank
    home, away = problem.q_rank, problem.k_rank
    tasks = tasks_of(problem, problem.pieces, away, step=np.where(local, 0, 1))
    tasks["qslot"] = np.where(local, 0, 1 + home)
    tasks["oslot"] = 1 + home
    low, high = tasks.copy(), tasks.copy()
    low["h1"] = high["h0"] = problem.shapes.q_heads // 2
    moves = [_visits(problem, half) for half in (0, 1)]
    moves += [_returns(problem, out, half) for half in (0, 1)]
    return finish(
        problem, direction, "travelling_queries", np.concatenate([low, high]), np.concatenate(moves)
    )


def _pairs(world: int) -> tuple[np.ndarray, np.ndarray]:
    owner, visited = (x.ravel() for x in np.indices((world, world)))
    return owner, visited


def _with_heads(problem: Problem, moves: np.ndarray, half: int) -> np.ndarray:
    middle = problem.shapes.q_heads // 2
    moves["sh"] = moves["dh"] = half * middle
    moves["nheads"] = problem.shapes.q_heads - middle if half else middle
    return moves[moves["nheads"] > 0]


def _visits(problem: Problem, half: int) -> np.ndarray:
    owner, visited = _pairs(problem.world)
    owner, visited = owner[owner != visited], visited[owner != visited]
    moves = moves_of(
        problem,
        len(owner),
        post=0,
        src=owner,
        dst=visited,
        channel=Channel.Q,
        dslot=1 + owner,
        rows=problem.layout.sizes[owner],
        op=Op.SET,
        dtype=Wire.INPUT,
    )
    return _with_heads(problem, moves, half)


def _returns(problem: Problem, out: Channel, half: int) -> np.ndarray:
    owner, visited = _pairs(problem.world)
    moves = moves_of(
        problem,
        len(owner),
        post=2,
        src=visited,
        dst=owner,
        channel=out,
        sslot=1 + owner,
        dslot=0,
        rows=problem.layout.sizes[owner],
        op=np.where((owner == visited) & (out == Channel.DQ), Op.SET, Op.ADD),
        take=1,
        dtype=problem.wire,
    )
    return _with_heads(problem, moves, half)


def travelling_plan(context: ra.ContextParallel, mask: Mask, layout: Layout) -> ra.Plan:
    """A plan of that method for a context."""
    posed = Problem(
        mask=mask,
        layout=layout,
        shapes=context.shapes,
        ranks_per_node=context.ranks_per_node,
        wire=context.wire,
    )
    schedules = travelling_queries(posed, "forward"), travelling_queries(posed, "backward")
    return ra.Plan(context, mask, layout, "travelling_queries", schedules)

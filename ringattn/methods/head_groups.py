"""Head groups with masks of their own: one plan for each, side by side in one schedule.

Key heads whose query heads share a mask are planned together and on their own, so that each
key head's rows move only as far as its own mask needs them. The plans touch different heads of the
same slots, and run step by step together. Where query heads of one key head have several masks,
that key head is a part by itself, and its tasks name their query heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ringattn.methods.common import Problem, finish
from ringattn.schedule import Channel, Schedule

QUERY_SIDE = (Channel.Q, Channel.O, Channel.DQ)
Generator = Callable[[Problem], Schedule]


@dataclass(frozen=True)
class HeadPart:
    """Query heads [q0, q1), which are those of key heads [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int


def head_parts(problem: Problem) -> list[HeadPart]:
    """Key heads in runs that share one mask, and those with several masks one by one."""
    shapes = problem.shapes
    ratio = shapes.q_heads // shapes.kv_heads
    group = np.repeat(
        np.arange(len(problem.mask.heads)), problem.mask.head_counts(shapes.q_heads)
    ).reshape(shapes.kv_heads, ratio)
    alike = (group == group[:, :1]).all(axis=1)
    starts = [0] + [
        h
        for h in range(1, shapes.kv_heads)
        if not (alike[h - 1] and alike[h] and group[h, 0] == group[h - 1, 0])
    ]
    ends = [*starts[1:], shapes.kv_heads]
    return [HeadPart(a * ratio, b * ratio, a, b) for a, b in zip(starts, ends, strict=True)]


def per_head_group(plan: Generator) -> Generator:
    """A generator for masks that differ between heads, from one that plans all heads alike."""

    def planned(problem: Problem) -> Schedule:
        problem.mask.head_counts(problem.shapes.q_heads)  # refuses groups that do not fit
        if problem.mask.is_uniform:
            return plan(problem)
        parts = head_parts(problem)
        if len(parts) == 1:
            return plan(problem)
        made: dict[tuple[str, int], Schedule] = {}
        tasks, moves = [], []
        for part in parts:
            posed = problem.for_heads(part.q0, part.q1, part.k1 - part.k0)
            key = (posed.mask.key, posed.shapes.q_heads)
            if key not in made:
                made[key] = plan(posed)
            own_tasks, own_moves = shift_heads(made[key], part)
            tasks.append(own_tasks)
            moves.append(own_moves)
        first = next(iter(made.values()))
        method = first.key.partition(":")[0]
        return finish(
            problem, first.direction, method, np.concatenate(tasks), np.concatenate(moves)
        )

    return planned


def shift_heads(schedule: Schedule, part: HeadPart) -> tuple[np.ndarray, np.ndarray]:
    """Tasks and moves of a part's plan, with the heads of the whole."""
    tasks, moves = schedule.tasks.copy(), schedule.moves.copy()
    for name in ("h0", "h1", "head"):
        tasks[name] += part.q0
    offset = np.where(np.isin(moves["channel"], QUERY_SIDE), part.q0, part.k0)
    moves["sh"] += offset
    moves["dh"] += offset
    return tasks, moves

"""Picks layout and method where the caller left them to "auto", by a nominal cost.

The cost of a plan is the busiest rank's kernel work plus its received bytes, with a fixed exchange
rate between the two: every rank computes the same figure from the mask alone.
"""

from collections.abc import Callable, Mapping

import numpy as np

from ringattn import layouts, methods
from ringattn.errors import UserError
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.methods.common import Problem
from ringattn.schedule import Schedule

BALANCED = 1.02  # busiest rank over mean rank; within it no finer layout is tried
FLOPS_PER_BYTE = 1000.0  # between a CPU over loopback (about 60) and a GPU over a NIC (about 8000)
AUTO_METHODS = ("ring", "direct")  # what "auto" weighs
FLOPS_PER_PAIR = {"forward": 4.0, "backward": 10.0}  # per (query, key) pair, head and head dim
Schedules = tuple[Schedule, Schedule]


def choose(
    mask: Mask,
    world: int,
    ranks_per_node: int,
    layout: str | Layout,
    method: str,
    problem: Callable[[Mask, Layout], Problem],
    layout_options: Mapping[str, int | float] | None = None,
) -> tuple[Layout, str, Schedules]:
    """Returns the layout, the method's name and its forward and backward schedules.

    "auto" tries contiguous, zigzag and area_greedy, stopping at the first that balances mask area
    within 2 %, and ring and direct on them; the cheapest wins, the earlier on a tie.
    """
    names = AUTO_METHODS if method == "auto" else (method,)
    best = None
    for candidate in _layouts(mask, world, ranks_per_node, layout, layout_options or {}):
        posed = problem(mask, candidate)
        for name in names:
            schedules = _schedules(name, posed)
            cost = nominal_cost(schedules)
            if best is None or cost < best[0]:
                best = (cost, candidate, name, schedules)
    assert best is not None
    return best[1:]


def nominal_cost(schedules: Schedules) -> float:
    """FLOPs of the busiest rank, forward and backward, with bytes turned into FLOPs."""
    total = 0.0
    for schedule in schedules:
        shapes = schedule.shapes
        pair = FLOPS_PER_PAIR[schedule.direction] * (shapes.qk_dim + shapes.v_dim) / 2
        tasks = schedule.tasks
        weights = tasks["cost"] * (tasks["h1"] - tasks["h0"])
        work = np.bincount(tasks["rank"], weights=weights)
        received = np.bincount(schedule.moves["dst"], weights=schedule.move_bytes)
        total += pair * work.max(initial=0.0) + FLOPS_PER_BYTE * received.max(initial=0.0)
    return total


def _schedules(name: str, problem: Problem) -> Schedules:
    method = methods.by_name(name)
    return method.forward(problem), method.backward(problem)


def _layouts(
    mask: Mask,
    world: int,
    ranks_per_node: int,
    layout: str | Layout,
    options: Mapping[str, int | float],
) -> list[Layout]:
    if isinstance(layout, Layout):
        return [fitting(layout, mask)]
    if layout != "auto":
        return [layouts.by_name(layout, mask, world, ranks_per_node, **options)]
    tried: list[Layout] = []
    for name in ("contiguous", "zigzag", "area_greedy"):
        tried.append(layouts.by_name(name, mask, world, ranks_per_node))
        if imbalance(mask, tried[-1]) <= BALANCED:
            break
    return tried


def fitting(layout: Layout, mask: Mask) -> Layout:
    """A given layout; raises UserError where it is for another number of tokens than the mask."""
    if layout.seq_len != mask.seq_len:
        raise UserError(
            f"layout for {layout.seq_len} tokens",
            f"the mask has {mask.seq_len}",
            "build the layout for the mask's seq_len",
        )
    return layout


def imbalance(mask: Mask, layout: Layout) -> float:
    """Mask area of the busiest rank's queries over the mean; for layouts of step 1."""
    ranges = layout.ranges[np.argsort(layout.ranges["start"])]
    area = mask.row_area(ranges["start"], ranges["stop"])
    per_rank = np.bincount(ranges["owner"], weights=area, minlength=layout.world)
    return float(per_rank.max() / per_rank.mean()) if per_rank.sum() else 1.0

"""Picks layout and method where the caller left them to "auto": by area balance, then bytes."""

from collections.abc import Callable

import numpy as np

from ringattn import layouts, methods
from ringattn.errors import UserError
from ringattn.layouts import Layout
from ringattn.masks import Mask
from ringattn.methods.common import Problem
from ringattn.schedule import Schedule
from ringattn.tiles import cropped_area

BALANCED = 1.02  # slowest rank over mean rank; below it the simpler layout is kept
Schedules = tuple[Schedule, Schedule]


def choose(
    mask: Mask,
    world: int,
    layout: str | Layout,
    method: str,
    problem: Callable[[Mask, Layout], Problem],
) -> tuple[Layout, str, Schedules]:
    """Returns the layout, the method's name and its forward and backward schedules.

    layout "auto": the first of contiguous, zigzag, area_greedy that is balanced, else the most
    balanced. method "auto": the one whose busiest receiver gets fewer bytes.
    """
    chosen = _layout(mask, world, layout)
    candidates = tuple(methods.METHODS) if method == "auto" else (method,)
    posed = problem(mask, chosen)
    built = {name: _schedules(name, posed) for name in candidates}
    best = min(candidates, key=lambda name: _busiest(built[name]))
    return chosen, best, built[best]


def _schedules(name: str, problem: Problem) -> Schedules:
    method = methods.by_name(name)
    return method.forward(problem), method.backward(problem)


def _busiest(schedules: Schedules) -> int:
    total = 0
    for schedule in schedules:
        received = np.bincount(schedule.moves["dst"], weights=schedule.move_bytes)
        total += int(received.max(initial=0))
    return total


def _layout(mask: Mask, world: int, layout: str | Layout) -> Layout:
    if isinstance(layout, Layout):
        if layout.seq_len != mask.seq_len:
            raise UserError(
                f"layout for {layout.seq_len} tokens",
                f"the mask has {mask.seq_len}",
                "build the layout for the mask's seq_len",
            )
        return layout
    if layout != "auto":
        return layouts.by_name(layout, mask, world)
    tried = []
    for name in ("contiguous", "zigzag", "area_greedy"):
        candidate = layouts.by_name(name, mask, world)
        spread = imbalance(mask, candidate)
        if spread <= BALANCED:
            return candidate
        tried.append((spread, len(tried), candidate))
    return min(tried, key=lambda t: t[:2])[2]


def imbalance(mask: Mask, layout: Layout) -> float:
    """Mask area of the busiest rank's queries over the mean; ranges must have step 1 or be one
    per rank."""
    ranges = layout.ranges[np.argsort(layout.ranges["start"])]
    area = cropped_area(mask.bands, ranges["start"], ranges["stop"])
    per_rank = np.bincount(ranges["owner"], weights=area, minlength=layout.world)
    return float(per_rank.max() / per_rank.mean()) if per_rank.sum() else 1.0

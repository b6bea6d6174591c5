"""Random cases for random plans: everything about one follows from its seed."""

from typing import Any

import numpy as np

import ringattn as ra
from ringattn.block_tiles import see
from ringattn.methods.common import Problem
from tests.core.cases import KERNELS, LAYOUTS, MASKS, Case, context_of, fits_heads, mask_of
from tests.core.random_plans import random_schedule

HEAD_COUNTS = ["4:4", "4:1", "8:1", "6:2", "3:3", "4:2"]


def random_case(seed: int, world: int | None = None, pieces: int = 160) -> Case:
    """Mask, layout, ranks, heads, batch and kernel of a seed.

    Args:
        world: ranks; random by default.
        pieces: a mask, layout and world that give more tiles are drawn again.
    """
    rng = np.random.default_rng([seed, 0])

    def pick(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    while True:
        case = {
            "mask": pick(list(MASKS)),
            "layout": pick(list(LAYOUTS)),
            "method": "ring",  # makes the context; the schedules are random ones
            "world": world or pick([1, 2, 2, 3, 4, 5, 6, 8]),
            "heads": pick(HEAD_COUNTS),
            "batch": pick([1, 2]),
            "kernel": pick(KERNELS),
            "seed": seed,
        }
        mask = mask_of(case["mask"])
        ranges = LAYOUTS[case["layout"]](mask, case["world"]).ranges
        if fits_heads(case) and len(see(mask, ranges, ranges)) <= pieces:
            return case


def random_plan(case: Case, group: Any = None, **options: Any) -> ra.Plan:
    """The random plan of a case, over simulated ranks unless a group is given."""
    rng = np.random.default_rng([case["seed"], 1])
    world = case["world"]
    node = int(rng.choice([n for n in range(1, world + 1) if world % n == 0]))
    context = context_of(case, world if group is None else group, ranks_per_node=node, **options)
    mask = mask_of(case["mask"])
    assert isinstance(context.layout, ra.Layout)
    problem = Problem(mask=mask, layout=context.layout, shapes=context.shapes, ranks_per_node=node)
    schedules = random_schedule(problem, "forward", rng), random_schedule(problem, "backward", rng)
    return ra.Plan(context, mask, context.layout, "random", schedules)

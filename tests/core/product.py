"""The product of everything that the simulated exactness tests range over, up to eight ranks.

A mask of `MASKS` joins by itself. A kind of case that cannot be gets a line in `allowed`; whatever
the library itself refuses with a UserError may stay in the full product, which counts refusals.
"""

import itertools
from typing import Any

import numpy as np
import torch

import ringattn as ra
from tests.core.cases import (
    KERNELS,
    LAYOUTS,
    MASKS,
    METHOD_NAMES,
    NODE_LAYOUTS,
    Case,
    Inputs,
    fits_heads,
    heads_of,
    inputs_of,
    mask_of,
    options_of,
    plan_of,
    reference_of,
)
from tests.core.exactness import relative_errors, simulate_plan
from tests.pairwise import drawn_pairwise

RANKS = [
    (1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (5, 1), (5, 5), (6, 1), (6, 2),
    (6, 6), (8, 1), (8, 2), (8, 4), (8, 8),
]  # fmt: skip
"""(ranks, ranks of a node)."""
FEW_RANKS = [r for r in RANKS if r not in ((5, 1), (6, 1), (6, 6), (8, 1), (8, 4))]
CONTEXT_FIRST = "loongtrain:u=2:context_first=1"
METHODS = [
    *METHOD_NAMES, CONTEXT_FIRST, "tile:tile_a=2", "ulysses:u=2", "usp:u=2", "hybrid:u=2:stages=2",
]  # fmt: skip
AXES: dict[str, list] = {
    "mask": list(MASKS),
    "layout": [*LAYOUTS, *NODE_LAYOUTS],
    "method": METHODS,
    "ranks": RANKS,
    "heads": ["4:4", "4:1", "8:1", "6:2", "5:5"],
    "batch": [1, 2],
    "kernel": KERNELS,
}
PRECISION_AXES: dict[str, list] = {
    "mask": ["causal", "streaming", "documents_causal", "strided_bands"],
    "layout": ["zigzag", "striped", "zero_tokens", "hybrid"],
    "method": METHODS,
    "ranks": [(3, 1), (4, 2), (6, 2), (8, 4), (8, 8)],
    "heads": ["4:1", "8:1", "6:2"],
    "batch": [1],
    "kernel": ["matmul", "matmul+sinks"],
    "precision": ["float32", "bfloat16", "float16", "bfloat16 wire", "float16 wire"],
}
ALLOWED_EPS = {"float32": 12.0, "bfloat16": 3.0, "float16": 3.0}
"""Largest relative error in units of the dtype's eps: in float32 that of the sums, in 16 bits that
of the inputs' and the results' rounding (sums are float32) and of partial results on the wire."""
FULL_PRECISION = 4000  # cases of other dtypes in the full product


def allowed(case: Case) -> bool:
    """Whether the library makes such a plan."""
    (q_heads, _), (world, _) = heads_of(case), case["ranks"]
    options = options_of(case["method"])
    degree = world if case["method"] == "ulysses" else options.get("u", 1)
    divides = all(world % options.get(name, 1) == 0 for name in ("u", "tile_a"))
    return divides and degree <= q_heads and fits_heads(case)


def values_of(case: Case) -> dict[str, Any]:
    """A covering case by axes, its ranks and nodes together."""
    return {n: v for n, v in case.items() if n not in ("world", "node")} | {
        "ranks": (case["world"], case["node"])
    }


def _placed(cases: list[Case]) -> list[Case]:
    """The cases with their ranks as world and node."""
    return [
        {name: value for name, value in case.items() if name != "ranks"}
        | {"world": case["ranks"][0], "node": case["ranks"][1]}
        for case in cases
    ]


def covering() -> list[Case]:
    """Few cases with every allowed pair of values, in float64; of variants and nodes only some."""
    some = {"ranks": FEW_RANKS, "method": [*METHOD_NAMES, CONTEXT_FIRST]}
    return _placed(drawn_pairwise(AXES | some, allowed))


def covering_precisions() -> list[Case]:
    """Few cases with every allowed pair of values, in other dtypes."""
    return _placed(drawn_pairwise(PRECISION_AXES, allowed))


def whole() -> list[Case]:
    """Mask × layout × method × ranks, each with heads, batch and kernel drawn from a seed."""
    names, rest = ("mask", "layout", "method", "ranks"), ("heads", "batch", "kernel")
    rng, cases = np.random.default_rng(0), []
    for values in itertools.product(*(AXES[name] for name in names)):
        drawn = {name: AXES[name][int(rng.integers(len(AXES[name])))] for name in rest}
        cases.append(dict(zip(names, values, strict=True)) | drawn)
    return _placed([case for case in cases if allowed(case)])


def some_precisions() -> list[Case]:
    """Cases of other dtypes drawn from a seed, over all masks, layouts and ranks."""
    rng, axes = np.random.default_rng(1), AXES | {"precision": PRECISION_AXES["precision"]}
    drawn: list[Case] = []
    while len(drawn) < FULL_PRECISION:
        case: Case = {name: v[int(rng.integers(len(v)))] for name, v in axes.items()}
        if allowed(case):
            drawn.append(case)
    return _placed(drawn)


def proved_errors(case: Case) -> dict[str, float]:
    """Proves the plan of a case on integers; its relative errors over simulated ranks."""
    plan = plan_of(case)
    ra.verify(plan)
    return relative_errors(simulate_plan(plan, inputs_of(case)), reference_of(case))


def part_of_allowed(case: Case) -> dict[str, float]:
    """As `proved_errors` for inputs of the case's precision; 1 is as much as is allowed."""
    name, _, wire = case["precision"].partition(" ")
    dtype: Any = getattr(torch, name)
    x = inputs_of(case)
    cast = Inputs(
        *(t.to(dtype) for t in x.tensors),
        sinks=None if x.sinks is None else x.sinks.to(dtype),
        softcap=x.softcap,
    )
    plan = plan_of(case, dtype=dtype, wire_dtype=dtype if wire else torch.float32)
    ra.verify(plan)
    want = ra.reference(*cast.tensors[:3], mask_of(case["mask"]), cast.dout, **cast.extras)
    errors = relative_errors(simulate_plan(plan, cast), want)
    bar = ALLOWED_EPS[name] * torch.finfo(dtype).eps
    return {tensor: error / bar for tensor, error in errors.items()}

"""Plans of every mask with the Triton band kernel in its interpreter, over simulated ranks.

Blocks are small, so that 60 tokens fall into many; partial results go from hop to hop through the
kernel's accumulators. The default run takes a pairwise-covering part of mask × layout × method ×
ranks × heads × kernel (with sinks, softcap, unequal head dims) × precision × variant × blocks; a
larger sample is marked full and resumable.
"""

import itertools

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.arena import Arena
from ringattn.kernels import select
from tests.core import product
from tests.core.cases import MASKS, Case, mixed, plan_of
from tests.core.exactness import same_bits
from tests.grid import run_grid
from tests.kernels.triton_kernels import band_kernel
from tests.pairwise import drawn_pairwise

AXES: dict[str, list] = {
    "mask": list(MASKS),
    "layout": ["contiguous", "zigzag", "striped", "zero_tokens", "scattered"],
    "method": ["ring", "burst", "direct", "tile", "all_gather", "usp:u=2", "double_ring"],
    "ranks": [(1, 1), (2, 1), (3, 1), (4, 2)],
    "heads": ["4:4", "4:1", "8:2", "6:2"],
    "batch": [1, 2],
    "kernel": ["triton", "triton+sinks", "triton+softcap", "triton+dims"],
    "precision": ["float32", "bfloat16", "float16"],
    "variant": ["pointers", "tma", "deterministic", "deterministic tma"],
    "blocks": [(16, 16), (32, 16), (16, 32)],
}
SAMPLE = 1500  # cases of the larger run


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The registry, so that a test may put its own kernel in."""
    known = dict(select._registry())
    monkeypatch.setattr(select, "_registry", lambda: known)
    return known


FEW: dict[str, list] = {
    "layout": ["contiguous", "zigzag", "striped"],
    "method": ["ring", "burst", "direct"],
    "ranks": [(1, 1), (2, 1), (3, 1)],
    "heads": ["4:4", "4:1", "6:2"],
    "batch": [1],
}
"""What takes least time in the interpreter."""


def _covering() -> list[Case]:
    """Every mask at least once, and every pair of values of two other axes."""
    rest = {name: values for name, values in (AXES | FEW).items() if name != "mask"}
    pairs = drawn_pairwise(rest, lambda case: product.allowed(case | {"mask": "causal"}))
    cases, open_masks = [], list(MASKS)
    for values in itertools.islice(itertools.cycle(pairs), max(len(pairs), 4 * len(MASKS))):
        fitting = (m for m in [*open_masks, *MASKS] if product.allowed(values | {"mask": m}))
        mask = next(fitting)
        cases.append({"mask": mask} | values)
        if mask in open_masks:
            open_masks.remove(mask)
        if not open_masks and len(cases) >= len(pairs):
            break
    assert not open_masks
    return product._placed(cases)


def _sample() -> list[Case]:
    rng, drawn = np.random.default_rng(0), []
    while len(drawn) < SAMPLE:
        case: Case = {name: v[int(rng.integers(len(v)))] for name, v in AXES.items()}
        if product.allowed(case):
            drawn.append(case)
    return product._placed(drawn)


def _errors(case: Case, registry: dict) -> dict[str, float]:
    """Errors in units of those allowed, with a kernel of the case's variant and blocks."""
    registry["triton"] = lambda: band_kernel(case["variant"], case["blocks"])
    rest = {name: v for name, v in case.items() if name not in ("variant", "blocks")}
    return product.part_of_allowed(rest)


@pytest.mark.parametrize("case", _covering(), ids=lambda case: f"{case['mask']}-{case['variant']}")
def test_a_covering_part_of_the_product(case: Case, registry: dict) -> None:
    parts = _errors(case, registry)
    assert max(parts.values()) <= 1, f"{case}: {parts} of the errors allowed"


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
def test_a_large_sample(grid_seconds: float | None, registry: dict) -> None:
    run_grid(
        "triton_simulated",
        mixed(_sample()),
        lambda case: _errors(case, registry),
        tolerance=1.0,
        axes=("mask", "method", "heads", "kernel", "precision", "variant", "blocks"),
        seconds=grid_seconds,
        note="The Triton band kernel in its interpreter; cases drawn from a seed. Errors are "
        "relative, in units of those allowed, which are "
        f"{product.ALLOWED_EPS} times the dtype's eps.",
    )


CASE = {
    "mask": "documents_causal",
    "layout": "striped",
    "method": "ring",
    "world": 2,
    "node": 1,
    "heads": "2:1",
    "batch": 1,
    "kernel": "triton",
    "precision": "float32",
}


def _simulated(registry: dict, variant: str) -> ra.Simulated:
    registry["triton"] = lambda: band_kernel(variant)
    plan = plan_of(CASE, dtype=torch.float32)
    x = product.inputs_of(CASE)
    return ra.simulate(plan, *(t.float() for t in x.tensors))


@pytest.mark.parametrize("variant", ["deterministic", "deterministic tma"])
def test_deterministic_gradients_repeat_bit_by_bit(registry: dict, variant: str) -> None:
    assert same_bits(_simulated(registry, variant), _simulated(registry, variant))


def test_memory_that_holds_no_numbers_does_not_reach_the_result(
    registry: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks read by TMA reach beyond their tiles; slots must not hold what memory held before."""
    take = Arena.take

    def poisoned(arena: Arena, shape: tuple, dtype: torch.dtype, device: torch.device):
        return take(arena, shape, dtype, device).view(torch.uint8).fill_(0xFF).view(dtype)

    clean = _simulated(registry, "deterministic tma")
    monkeypatch.setattr(Arena, "take", poisoned)
    assert same_bits(_simulated(registry, "deterministic tma"), clean)

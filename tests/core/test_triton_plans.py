"""Plans of every mask with the Triton band kernel in its interpreter, over simulated ranks.

Blocks are small, so that 60 tokens fall into many; partial results go from hop to hop through the
kernel's accumulators. The default run takes a pairwise-covering part of mask × layout × method ×
ranks × heads × kernel (with sinks, softcap, unequal head dims) × precision × variant × blocks; a
larger sample is marked full and resumable.
"""

from collections.abc import Iterator

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
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """The registry, so that a test may put its own kernel in."""
    known = dict(select._registry())
    monkeypatch.setattr(select, "_registry", lambda: known)
    return known


def _covering() -> list[Case]:
    return product._placed(drawn_pairwise(AXES, product.allowed))


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


@pytest.mark.parametrize("mask", MASKS)
def test_a_covering_part_of_the_product(mask: str, registry: dict) -> None:
    for case in (c for c in _covering() if c["mask"] == mask):
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
    "world": 3,
    "node": 1,
    "heads": "4:1",
    "batch": 2,
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


def test_a_partial_block_taken_for_whole_is_noticed(
    registry: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the mask on items of fewer rows than a block, rows of other items leak into dq."""
    from ringattn.kernels import work_lists

    monkeypatch.setattr(work_lists, "SHORT_RUN", 0)  # columns come from runs
    good = _simulated(registry, "tma")
    from ringattn.kernels import triton_backward

    bounds = triton_backward.run_bounds

    def wider(*arguments):
        first, end, full0, full1 = bounds(*arguments)
        return first, end, full0 - 16, full1

    monkeypatch.setattr(triton_backward, "run_bounds", wider)
    assert not torch.allclose(_simulated(registry, "tma").dk, good.dk, rtol=1e-3)

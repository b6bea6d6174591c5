"""The checks that hold a plan against the dense float64 reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import ringattn as ra
from ringattn import executor
from tests.closeness import rel_error
from tests.core.cases import Case, Inputs, inputs_of, mask_of, plan_of, reference_of

TOLERANCE = 1e-12  # relative, float64; the rounding of these sizes stays below 1e-14
NAMES = ("out", "lse", "dq", "dk", "dv")


def relative_errors(got: ra.Simulated, want: tuple) -> dict[str, float]:
    """Error of every tensor that the reference has, by name."""
    names = [*NAMES, "dsinks"]
    pairs = {n: (getattr(want, n), getattr(got, n)) for n in names}
    assert (pairs["dsinks"][0] is None) == (pairs["dsinks"][1] is None)
    return {n: rel_error(ref, x) for n, (ref, x) in pairs.items() if ref is not None}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory is NaN wherever nothing has been written, so that reading it cannot go unnoticed."""

    def take(arena: Any, shape: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        del arena
        made = torch.empty(shape, dtype=dtype, device=device)
        return made.fill_(255 if dtype == torch.uint8 else torch.nan)

    with mock.patch.object(executor.Arena, "take", take):
        yield


def simulate_plan(plan: ra.Plan, x: Inputs, scale: float | None = None) -> ra.Simulated:
    """Forward and backward of the plan over simulated ranks; checks the bytes on the wire."""
    result = ra.simulate(plan, x.q, x.k, x.v, x.dout, scale=scale, **x.extras)
    for direction, received in zip(("forward", "backward"), result.received, strict=True):
        planned = [x.q.shape[0] * plan.bytes(rank, direction) for rank in range(plan.world)]
        assert list(received) == planned, f"{direction}: bytes received and planned differ"
    return result


def simulated_errors(case: Case) -> dict[str, float]:
    """Relative errors of a case's plan over simulated ranks."""
    return relative_errors(simulate_plan(plan_of(case), inputs_of(case)), reference_of(case))


def assert_exact(errors: dict[str, float]) -> None:
    """Fails, naming the tensors, unless all errors are within the tolerance."""
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, f"relative errors above {TOLERANCE}: {wrong}"


def check_case(case: Case, plan: ra.Plan | None = None) -> None:
    """Holds the simulated results of a case against the reference, with this plan or its own."""
    plan = plan or plan_of(case)
    result = simulate_plan(plan, inputs_of(case))
    assert_exact(relative_errors(result, reference_of(case)))
    assert plan.mask.seq_len == mask_of(case["mask"]).seq_len


def same_bits(a: ra.Simulated, b: ra.Simulated) -> bool:
    """Whether two runs gave the same bits."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in NAMES]
    return all(torch.equal(x, y) for x, y in pairs)

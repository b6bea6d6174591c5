"""Random plans: valid ones are proved and exact; a change to one is refused or does no harm.

Everything follows from a seed, which every failure names. `--seed N` starts the seeds at N * 10**6;
`random_plan(random_case(seed))` makes the plan of a seed again.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn import PlanError
from ringattn.schedule import Channel, Lane, Op, Schedule, Wire
from ringattn.verify import verify_schedule
from tests.closeness import rel_error
from tests.core.cases import Case, Inputs, inputs_of, reference_of
from tests.core.exactness import (
    NAMES,
    TOLERANCE,
    assert_exact,
    poisoned_memory,
    relative_errors,
    same_bits,
    simulate_plan,
)
from tests.core.gloo import run_cases
from tests.core.random_cases import random_case, random_plan
from tests.core.random_faults import random_fault
from tests.grid import run_grid
from tests.ranks import run_ranks

BATCHES, PLANS = 8, 4  # plans of the default run: so many tests of so many plans
FAULTS = 12  # per plan
FULL = 4000


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    """Where the seeds of this run start."""
    return 10**6 * int(request.config.getoption("--seed") or 0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield


@contextmanager
def _naming(case: Case) -> Iterator[None]:
    """Failures inside name the case with its seed."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error


def _errors(case: Case) -> dict[str, float]:
    """Proves a random plan, runs it over simulated ranks and returns its errors."""
    plan = random_plan(case)
    ra.verify(plan)
    return relative_errors(simulate_plan(plan, inputs_of(case)), reference_of(case))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_random_plan_is_proved_and_exact(batch: int, first_seed: int) -> None:
    for index in range(PLANS):
        case = random_case(first_seed + PLANS * batch + index)
        with _naming(case):
            assert_exact(_errors(case))


def _outcome(plan: ra.Plan, case: Case) -> str:
    """What is wrong with the simulated results of a plan; empty where they are exact."""
    try:
        got = simulate_plan(plan, inputs_of(case))
        errors = relative_errors(got, reference_of(case))
    except Exception as error:
        return f"it does not run: {error}"
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    return f"errors {wrong}" if wrong else ""


def _try_fault(case: Case, plan: ra.Plan, rng: np.random.Generator) -> str:
    """Breaks one direction of a plan at random; returns who noticed.

    What the verifier accepts must run and be exact. Where it says that outputs end wrong, they
    must be wrong in numbers too; gradients need not be, for a row that sees one key has none.
    """
    forward = bool(rng.integers(2))
    what, broken = random_fault(plan.forward if forward else plan.backward, rng)
    pair = (broken, plan.backward) if forward else (plan.forward, broken)
    changed = ra.Plan(plan.context, plan.mask, plan.layout, "broken", pair)
    direction = "forward" if forward else "backward"
    refusal = _refusal(broken, plan)
    if refusal:
        # A sum that blocks selected at run time, or a sink, leave out may still be exact.
        strict = plan.mask.routing is None and case["kernel"].endswith("+sinks")
        if forward and strict and "wrong O" in refusal and rng.random() < 0.2:
            assert _outcome(changed, case), f"{direction}, {what}: refused ({refusal}), but exact"
        return "verifier"
    outcome = _outcome(changed, case)
    assert not outcome, f"{direction}, {what}: the verifier accepts it, but {outcome}"
    return "nobody"


def _refusal(schedule: Schedule, plan: ra.Plan) -> str:
    """Why the verifier refuses a schedule in the place of one of the plan's; empty where it does
    not."""
    try:
        verify_schedule(schedule, plan.mask, plan.layout)
    except PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_random_fault_is_refused_or_harmless(batch: int, first_seed: int) -> None:
    case = random_case(first_seed + 1000 + batch)
    plan, rng = random_plan(case), np.random.default_rng([case["seed"], 2])
    with _naming(case):
        noticed = [_try_fault(case, plan, rng) for _ in range(FAULTS)]
    assert "verifier" in noticed, f"{case}: no fault was noticed"


def _facts(schedule: Schedule) -> dict[str, np.ndarray]:
    """What a schedule may use, and where this one does."""
    moves, tasks = schedule.moves, schedule.tasks
    facts = {
        "long moves": moves["land"] > moves["post"],
        "local copies": moves["src"] == moves["dst"],
        "head ranges": moves["nheads"] < schedule.shapes.q_heads,
        "other heads": moves["sh"] != moves["dh"],
        "other rows": moves["s0"] != moves["d0"],
        "partials that stay": (moves["take"] == 0) & (moves["channel"] >= Channel.O),
        "SETs at home": (moves["dslot"] == 0) & (moves["op"] == Op.SET),
        "results that leave home": (moves["sslot"] == 0) & (moves["take"] != 0),
        "relayed operands": (moves["sslot"] > 0) & (moves["channel"] <= Channel.K),
        "relayed results": (moves["dslot"] > 0) & (moves["channel"] >= Channel.O),
        "executors without tokens": schedule.home_rows[tasks["rank"]] == 0,
        "idle steps": ~np.isin(np.arange(schedule.nsteps), tasks["step"]),
        "eight ranks": np.array([schedule.world == 8]),
    }
    facts |= {str(lane): moves["lane"] == lane for lane in Lane}
    facts |= {str(wire): moves["dtype"] == wire for wire in Wire}
    for op, channel in itertools.product(Op, Channel):
        if op == Op.SET or channel >= Channel.O:
            facts[f"{op} of {channel}"] = (moves["op"] == op) & (moves["channel"] == channel)
    return facts


def test_random_plans_use_all_that_a_schedule_can_say(first_seed: int) -> None:
    """Otherwise they would prove less than they seem to."""
    missing: set[str] | None = None
    for seed in range(40):
        plan = random_plan(random_case(first_seed + seed))
        for schedule in (plan.forward, plan.backward):
            absent = {name for name, true in _facts(schedule).items() if not true.any()}
            missing = absent if missing is None else missing & absent
    assert missing == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_bits_of_random_plans_in_other_dtypes(
    dtype: torch.dtype, first_seed: int
) -> None:
    for seed in range(4):
        case = random_case(first_seed + seed, world=3) | {"kernel": "matmul"}
        with _naming(case):
            x = inputs_of(case)
            cast = Inputs(*(t.to(dtype) for t in x.tensors), sinks=None, softcap=None)
            plan = random_plan(case, dtype=dtype)
            first = simulate_plan(plan, cast)
            assert same_bits(first, simulate_plan(plan, cast))
            assert rel_error(reference_of(case).out, first.out) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("world", [2, 3, 4])
def test_random_plans_on_real_ranks(world: int, first_seed: int) -> None:
    cases = [random_case(first_seed + seed, world) for seed in range(2)]
    by_rank = run_ranks(world, run_cases, cases, random_plan)
    for case, *results in zip(cases, *by_rank, strict=True):
        with _naming(case):
            want, simulated = reference_of(case), simulate_plan(random_plan(case), inputs_of(case))
            for result in results:
                assert_exact({n: rel_error(getattr(want, n), t) for n, t in result.items()})
                for name in NAMES:
                    assert torch.equal(result[name], getattr(simulated, name)), name


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
def test_many_random_plans(first_seed: int, grid_seconds: float | None) -> None:
    """Each of them also with three faults."""

    def check(case: Case) -> dict[str, float]:
        plan, rng = random_plan(case), np.random.default_rng([case["seed"], 2])
        for _ in range(3):
            _try_fault(case, plan, rng)
        return _errors(case)

    cases = [random_case(first_seed + seed, pieces=500) for seed in range(FULL)]
    axes = ("mask", "layout", "world", "heads")
    note = "Random plans of random cases, each from its seed, with three random faults to each."
    run_grid(
        "random_plans", cases, check,
        tolerance=TOLERANCE, axes=axes, seconds=grid_seconds, note=note,
    )  # fmt: skip

"""One deliberate fault at a time: each must turn the check that guards it red.

The checks are those of the exactness tests: numbers against the dense reference (and bytes against
the plan), and the verifier's integers. A fault that they accept means that they prove nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from ringattn import PlanError, executor, masks
from ringattn.verify import verify_schedule
from tests.core import faults
from tests.core.cases import LAYOUTS, Case, context_of, mask_of, plan_of
from tests.core.exactness import check_case
from tests.core.gloo import run_case
from tests.core.handmade import travelling_plan
from tests.ranks import run_ranks


def _case(**values: Any) -> Case:
    base = {
        "mask": "causal",
        "layout": "zigzag",
        "method": "ring",
        "world": 4,
        "group": 4,
        "batch": 1,
        "kernel": "matmul",
    }
    return base | values


def _routed_case() -> Case:
    return _case(mask="routed_per_head", method="ulysses", group=1)


def _numbers(case: Case) -> None:
    check_case(case)


def _integers(case: Case) -> None:
    plan = plan_of(case)
    for schedule in (plan.forward, plan.backward):
        verify_schedule(schedule, mask_of(case["mask"]), plan.layout)


def _travelling(case: Case) -> None:
    mask, world = mask_of(case["mask"]), case["world"]
    layout = LAYOUTS[case["layout"]](mask, world)
    check_case(case, travelling_plan(context_of(case, world), mask, layout))


def _mask(case: Case) -> None:
    del case
    assert (masks.causal(16).dense() == np.tril(np.ones((16, 16), dtype=bool))).all()


@dataclass(frozen=True)
class Fault:
    """A fault, the case that it must spoil, and the check that must notice."""

    inject: Callable[[pytest.MonkeyPatch], None]
    check: Callable[[Case], None]
    case: Case


FAULTS = [
    Fault(faults.merge_without_weights, _numbers, _case(kernel="cpu_flash")),
    Fault(faults.merge_without_weights, _travelling, _case()),
    Fault(faults.merge_with_the_larger_lse, _numbers, _case(method="direct")),
    Fault(faults.merge_of_two_empty_sides, _travelling, _case(mask="strided_bands")),
    Fault(faults.adds_land_before_sets, _travelling, _case()),
    Fault(faults.taken_sources_are_not_cleared, _numbers, _case(mask="full")),
    Fault(faults.heads_land_in_the_other_half, _travelling, _case()),
    Fault(faults.rows_land_one_lower, _numbers, _case(mask="causal_window", layout="contiguous")),
    Fault(faults.keys_arrive_where_others_are_read, _integers, _case(mask="full")),
    Fault(faults.one_slot_for_two_gradients, _integers, _case(mask="full")),
    Fault(faults.one_slot_for_two_gradients, _integers, _case(mask="full", method="direct:3")),
    Fault(faults.positions_shifted_by_one, _numbers, _case()),
    Fault(faults.positions_shifted_by_one, _integers, _case()),
    Fault(faults.a_row_of_another_range, _numbers, _case()),
    Fault(faults.diagonal_one_higher, _mask, _case()),
    Fault(faults.band_one_wider, _numbers, _case(layout="striped")),
    Fault(faults.band_one_wider, _integers, _case(method="direct")),
    Fault(faults.source_row_off_by_one, _numbers, _case(method="direct", mask="causal_window")),
    Fault(faults.source_row_off_by_one, _integers, _case(method="direct", mask="causal_window")),
    Fault(faults.a_key_move_is_lost, _integers, _case()),
    Fault(faults.a_key_move_is_lost, _integers, _case(method="direct")),
    Fault(faults.the_last_task_is_lost, _numbers, _case()),
    Fault(faults.the_last_task_is_lost, _integers, _case(method="direct")),
    Fault(faults.a_gradient_stays_away, _numbers, _case()),
    Fault(faults.a_gradient_stays_away, _integers, _case()),
    Fault(faults.lse_of_local_keys, _numbers, _case(mask="full")),
    Fault(faults.delta_is_left_out, _numbers, _case()),
    Fault(faults.sinks_are_ignored, _numbers, _case(kernel="cpu_flash+sinks")),
    Fault(faults.softcap_has_no_slope, _numbers, _case(kernel="matmul+softcap")),
    Fault(faults.a_key_head_of_another_group, _numbers, _case(group=1)),
    Fault(faults.lse_is_not_counted, _travelling, _case()),
    Fault(faults.groups_take_the_first_heads, _numbers, _case(mask="per_head", group=1)),
    Fault(faults.groups_take_the_first_heads, _integers, _case(mask="per_head", group=1)),
    Fault(faults.slices_forget_their_heads, _numbers, _routed_case()),
    Fault(faults.slices_forget_their_heads, _integers, _routed_case()),
    Fault(faults.blocks_start_one_later, _numbers, _case(mask="blocks")),
    Fault(faults.blocks_start_one_later, _integers, _case(mask="blocks")),
    Fault(faults.one_block_less, _numbers, _case(mask="routed")),
]


def _name(fault: Fault) -> str:
    return f"{fault.inject.__name__}-{fault.check.__name__.strip('_')}"


@pytest.mark.parametrize("fault", FAULTS, ids=_name)
def test_a_fault_is_noticed(fault: Fault) -> None:
    fault.check(fault.case)  # the control: without the fault the same check passes
    with pytest.MonkeyPatch.context() as patch:
        fault.inject(patch)
        with pytest.raises((AssertionError, PlanError)):
            fault.check(fault.case)
    fault.check(fault.case)


def _with_shared_memory(
    rank: int, world: int, group: dist.ProcessGroup, case: Case, broken: bool
) -> str:
    """The case where every buffer of the arena starts at the same place."""
    del rank, world

    def take(original, arena, shape, dtype, device):
        arena._used = 0
        return original(arena, shape, dtype, device)

    original = executor.Arena.take
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(executor.Arena, "take", lambda *args: take(original, *args))
        try:
            run_case(group, case)
        except AssertionError as error:
            return str(error)
    return "accepted"


def test_shared_buffers_are_noticed_on_real_ranks() -> None:
    case = _case(world=2, mask="full")
    assert run_ranks(2, _with_shared_memory, case, False) == ["accepted"] * 2
    for message in run_ranks(2, _with_shared_memory, case, True):
        assert "bits" in message

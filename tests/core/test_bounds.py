"""Schedules that leave their slots or write to the caller's tensors are refused before they run."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn import PlanError, layouts, masks
from ringattn.bounds import check_bounds
from ringattn.methods import METHODS
from ringattn.schedule import Channel, Op, Schedule
from tests.core.cases import problem

LAYOUT = layouts.contiguous(64, 4)
FORWARD, BACKWARD = (
    getattr(METHODS["ring"], name)(problem(masks.full(64), LAYOUT, group=2))
    for name in ("forward", "backward")
)


def _change(schedule: Schedule, table: str, keep: dict[str, int], **values: int) -> Schedule:
    """The schedule with the first row of a table that has the kept values changed."""
    rows = getattr(schedule, table).copy()
    match = np.all([rows[name] == value for name, value in keep.items()], axis=0)
    index = int(np.flatnonzero(match)[0]) if keep else 0
    for name, value in values.items():
        rows[name][index] = value
    return replace(schedule, **{table: rows})


def _tasks(**values: int) -> Schedule:
    return _change(BACKWARD, "tasks", {}, **values)


def _keys(**values: int) -> Schedule:
    return _change(BACKWARD, "moves", {"channel": Channel.K}, **values)


CHANGES = {
    "a task on rank 4": (_tasks(rank=4), "task 0 is for a rank that does not exist"),
    "a task after the end": (_tasks(step=BACKWARD.nsteps), "task 0 is outside the plan's steps"),
    "an unknown query slot": (_tasks(qslot=3), "slot 3 of Q does not exist"),
    "an unknown gradient slot": (_tasks(gslot=9), "slot 9 of DKV does not exist"),
    "a negative slot": (_tasks(kslot=-1), "slot -1 of K does not exist"),
    "rows beyond home": (_tasks(q1=17), "task 0 has rows beyond its slot"),
    "keys beyond home": (_tasks(k1=17), "task 0 has keys beyond its slot"),
    "no keys": (_tasks(k0=5, k1=5), "task 0 has keys beyond its slot"),
    "heads beyond home": (_tasks(h1=5), "task 0 has heads beyond its slot"),
    "a negative head": (_tasks(h0=-1), "task 0 has heads beyond its slot"),
    "a move to rank 4": (_keys(dst=4), "is for a rank that does not exist"),
    "outputs in a backward": (_keys(channel=Channel.O), "a channel that a backward plan does not"),
    "a source beyond home": (_keys(s0=9), "reads beyond its source slot"),
    "no room where it lands": (_keys(d0=9), "does not fit its destination slot"),
    "more heads than there are": (_keys(nheads=3), "reads beyond its source slot"),
    "no heads": (_keys(nheads=0), "reads beyond its source slot"),
    "keys are taken": (_keys(take=1), "takes queries or keys away"),
    "keys are added": (_keys(op=Op.ADD), "adds to queries or keys"),
    "keys land at home": (_keys(dslot=0), "the caller's own tensors"),
    "three key heads for four": (
        _change(FORWARD, "slots", {"channel": Channel.K}, heads=3), "do not divide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_schedule_out_of_bounds_is_refused(what: str) -> None:
    schedule, message = CHANGES[what]
    with pytest.raises(PlanError, match=message):
        check_bounds(schedule)


def test_plans_of_methods_are_within_bounds() -> None:
    check_bounds(FORWARD)
    check_bounds(BACKWARD)


def test_the_executor_refuses_it() -> None:
    context = ra.ContextParallel(4, heads=(4, 2), head_dim=8, dtype=torch.float64, method="ring")
    plan = context.plan(masks.full(64))
    broken = replace(plan.forward, moves=_change(FORWARD, "moves", {}, dslot=0).moves)
    changed = ra.Plan(context, plan.mask, plan.layout, "broken", (broken, plan.backward))
    x = torch.zeros(1, 64, 4, 8, dtype=torch.float64)
    with pytest.raises(PlanError, match="the caller's own tensors"):
        ra.simulate(changed, x, x[:, :, :2], x[:, :, :2])

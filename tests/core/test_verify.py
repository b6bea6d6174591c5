"""The verifier refuses plans that break a rule: one deliberate change each."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import ringattn as ra
from ringattn import PlanError, layouts, masks
from ringattn.methods import METHODS
from ringattn.races import check_races
from ringattn.schedule import Channel, Op, Schedule
from ringattn.verify import verify_schedule
from tests.core.cases import plan_of, problem
from tests.core.handmade import travelling_queries

MASK, CAUSAL = masks.full(64), masks.causal(64)
LAYOUT = layouts.contiguous(64, 4)
RING = METHODS["ring"].backward(problem(MASK, LAYOUT))
DIRECT = METHODS["direct"].backward(problem(MASK, LAYOUT))
QUERIES = travelling_queries(problem(MASK, LAYOUT), "forward")


def _where(moves: np.ndarray, **values: int) -> int:
    """Index of the first move with these values."""
    match = np.ones(len(moves), dtype=bool)
    for name, value in values.items():
        match &= moves[name] == value
    return int(np.flatnonzero(match)[0])


def _change(schedule: Schedule, table: str, index: int, **values: int) -> Schedule:
    rows = getattr(schedule, table).copy()
    for name, value in values.items():
        rows[name][index] = value
    return replace(schedule, **{table: rows})


def _drop(schedule: Schedule, table: str, index: int) -> Schedule:
    return replace(schedule, **{table: np.delete(getattr(schedule, table), index)})


def _k_move(schedule: Schedule) -> int:
    return _where(schedule.moves, channel=Channel.K)


def _gradient_move(schedule: Schedule) -> int:
    return _where(schedule.moves, channel=Channel.DKV)


CHANGES: dict[str, tuple[Callable[[], Schedule], str]] = {
    "a task is lost": (lambda: _drop(RING, "tasks", 5), "wrong"),
    "a task is done twice": (
        lambda: replace(RING, tasks=np.concatenate([RING.tasks, RING.tasks[5:6]])), "wrong",
    ),
    "a task reads another slot": (lambda: _change(RING, "tasks", -1, kslot=1), "wrong|filled|SET"),
    "a task's band is one wider": (
        lambda: _change(METHODS["ring"].forward(problem(CAUSAL, LAYOUT)), "tasks", 0, hi=1),
        "wrong",
    ),
    "keys never leave": (lambda: _drop(RING, "moves", _k_move(RING)), "filled|wrong"),
    "keys come from another row": (
        lambda: _change(DIRECT, "moves", _k_move(DIRECT), s0=1, rows=15), "filled|wrong|fit",
    ),
    "two blocks of keys swap places": (
        lambda: _change(DIRECT, "moves", _k_move(DIRECT), src=3), "wrong",
    ),
    "a gradient never returns": (lambda: _drop(RING, "moves", _gradient_move(RING)), "wrong"),
    "a gradient overwrites": (
        lambda: _change(RING, "moves", _where(RING.moves, channel=Channel.DKV, dslot=0), op=Op.SET),
        "wrong",
    ),
    "an accumulator is not cleared": (
        lambda: _change(RING, "moves", _where(RING.moves, channel=Channel.DKV, post=2), take=0),
        "wrong",
    ),
    "a gradient leaves before it is complete": (
        lambda: _change(RING, "moves", _where(RING.moves, channel=Channel.DKV, post=2), post=1),
        "writes a move's source in flight",
    ),
    "a landing overwrites what is still to be sent": (
        lambda: _change(RING, "moves", _where(RING.moves, channel=Channel.DKV, post=2), land=4),
        "source in flight",
    ),
    "keys are read while they arrive": (
        lambda: _change(RING, "moves", _k_move(RING), land=1), "a task reads rows that a SET fills",
    ),
    "keys are sent on while they arrive": (
        lambda: _late_keys(), "captures rows that a SET fills",
    ),
    "a move lands before it is posted": (
        lambda: _change(RING, "moves", _gradient_move(RING), land=0), "before it is posted",
    ),
    "a move lands after the last step": (
        lambda: _change(RING, "moves", _gradient_move(RING), land=RING.nsteps), "after the last",
    ),
    "a slot does not exist": (lambda: _change(RING, "tasks", -1, kslot=7), "does not exist"),
    "a move reads beyond its slot": (
        lambda: _change(RING, "moves", _k_move(RING), rows=99), "beyond its source",
    ),
    "a move does not fit its slot": (
        lambda: _change(RING, "moves", _k_move(RING), d0=8), "does not fit",
    ),
    "heads arrive as other heads": (
        lambda: _change(QUERIES, "moves", _where(QUERIES.moves, channel=Channel.O, sh=2), dh=0),
        "wrong",
    ),
    "a merge comes before the value that it joins": (
        lambda: _change(QUERIES, "moves", _where(QUERIES.moves, src=0, dst=0), op=Op.ADD, take=0,
                        sslot=2), "wrong",
    ),
}  # fmt: skip


def _late_keys() -> Schedule:
    """Keys that arrive at the end of step 1 are captured in step 1; nobody else reads them."""
    schedule = METHODS["ring"].forward(problem(MASK, LAYOUT))
    first = _where(schedule.moves, channel=Channel.K, post=0)
    receiver = int(schedule.moves["dst"][first])
    idle = (schedule.tasks["rank"] == receiver) & (schedule.tasks["step"] == 1)
    changed = _change(schedule, "moves", first, land=1)
    return replace(changed, tasks=changed.tasks[~idle])


@pytest.mark.parametrize("what", CHANGES)
def test_a_broken_plan_is_refused(what: str) -> None:
    build, message = CHANGES[what]
    with pytest.raises(PlanError, match=message):
        verify_schedule(build(), CAUSAL if "wider" in what else MASK, LAYOUT)


def test_the_unchanged_plans_are_accepted() -> None:
    for schedule in (RING, DIRECT, QUERIES):
        verify_schedule(schedule, MASK, LAYOUT)
        check_races(schedule)


def test_another_mask_or_layout_is_refused() -> None:
    with pytest.raises(PlanError, match="wrong"):
        verify_schedule(RING, masks.sliding_window(64, 62, 63), LAYOUT)
    with pytest.raises(PlanError, match="wrong"):
        verify_schedule(RING, masks.causal(64), LAYOUT)


def test_swapped_rows_of_equal_area_are_noticed() -> None:
    """Every query sees the key 16 before it. Counting pairs would accept any order of the keys."""
    mask = masks.from_bands(64, [(16, 64, 0, 48, -16, -16, 1)])
    schedule = METHODS["direct"].forward(problem(mask, LAYOUT))
    verify_schedule(schedule, mask, LAYOUT)
    whole = schedule.moves[schedule.moves["dst"] == 2]
    low, high = whole.copy(), whole.copy()
    low["rows"] = high["rows"] = 8
    high["s0"] += 8
    low["d0"] += 8  # each half lands where the other belongs
    others = schedule.moves[schedule.moves["dst"] != 2]
    swapped = replace(schedule, moves=np.concatenate([others, low, high]))
    with pytest.raises(PlanError, match="rank 2 ends with wrong O"):
        verify_schedule(swapped, mask, LAYOUT)


def test_the_public_verifier_takes_a_plan() -> None:
    case = {
        "mask": "documents_causal", "layout": "zigzag", "method": "ring",
        "world": 3, "group": 4, "batch": 1, "kernel": "matmul",
    }  # fmt: skip
    ra.verify(plan_of(case))

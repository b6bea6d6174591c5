"""Stacks of masks on one layout: exact for every mask, chosen for all layers together."""

from typing import Any

import pytest
import torch

import ringattn as ra
from ringattn import layouts, masks
from ringattn.errors import UserError
from ringattn.stack import cost
from tests.core.cases import draw_inputs
from tests.core.exactness import assert_exact, relative_errors, simulate_plan
from tests.core.gloo import attend
from tests.ranks import run_ranks

LENGTHS = [41, 3, 20, 1, 66]
FULL = masks.documents(LENGTHS, causal=True)
WINDOW = masks.documents(LENGTHS, causal=True, window=9)
STACK = [WINDOW, WINDOW, FULL, WINDOW, FULL]
LONG = masks.documents([27768, 3000, 2000], causal=True)
LONG_WINDOW = masks.documents([27768, 3000, 2000], causal=True, window=1024)


def context(group: Any, **options: Any) -> ra.ContextParallel:
    options = {"heads": (4, 2), "head_dim": 8, "dtype": torch.float64} | options
    return ra.ContextParallel(group, **options)


def long_context(cluster: str | None, **options: Any) -> ra.ContextParallel:
    return context(2, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, cluster=cluster, **options)


def check_exact(plan: ra.Plan) -> None:
    x = draw_inputs(plan.mask.seq_len, (4, 2), 1)
    ra.verify(plan)
    assert_exact(relative_errors(simulate_plan(plan, x), _reference(plan.mask)))


def _reference(mask: ra.Mask) -> Any:
    x = draw_inputs(mask.seq_len, (4, 2), 1)
    return ra.reference(x.q, x.k, x.v, mask, x.dout)


@pytest.mark.parametrize("cluster", [None, "h100_sxm"])
@pytest.mark.parametrize("world", [1, 4])
def test_a_stack_is_exact_on_its_one_layout(world: int, cluster: str | None) -> None:
    plans = context(world, cluster=cluster).plans(STACK)
    assert [plan.mask.key for plan in plans] == [mask.key for mask in STACK]
    assert len({plan.layout for plan in plans}) == 1
    assert len(set(map(id, plans))) == 2
    for plan in plans[1:3]:
        check_exact(plan)


def test_equal_masks_are_the_plan_of_one() -> None:
    cp = context(4)
    again = masks.documents(LENGTHS, causal=True, window=1000)
    assert cp.plans([FULL, again, FULL]) == [cp.plan(FULL)] * 3
    assert cp.plans(STACK) == cp.plans(list(STACK))


@pytest.mark.parametrize("cluster", [None, "h100_sxm"])
def test_the_layout_is_that_of_the_least_total(cluster: str | None) -> None:
    """Few windows follow the whole documents' layout, many keep their own."""
    cp = long_context(cluster)
    own = {mask: cp.plan(mask).layout for mask in (LONG, LONG_WINDOW)}
    assert own[LONG].key != own[LONG_WINDOW].key
    found = {}
    for windows in (1, 8, 24, 400):  # at 8 or 24 not the heaviest mask's own layout
        stack = [LONG_WINDOW] * windows + [LONG]
        plans = cp.plans(stack)
        total = sum(cost(plan) for plan in plans)
        for place in own.values():
            there = [cp.plan(mask, layout=place) for mask in (LONG_WINDOW, LONG)]
            assert total <= (windows * cost(there[0]) + cost(there[1])) * (1 + 1e-9)
        found[windows] = plans[0].layout.key
    assert found[1] != found[400]


def test_methods_differ_on_one_layout() -> None:
    plans = long_context("h100_sxm").plans([LONG_WINDOW, LONG])
    assert plans[0].method != plans[1].method
    assert {
        plan.method for plan in long_context(None, method="ring").plans([LONG_WINDOW, LONG])
    } == {"ring"}


@pytest.mark.parametrize(
    "place", [layouts.striped(131, 4), layouts.contiguous(131, 4, [1, 0, 2, 128])]
)
def test_a_layout_that_does_not_suit_is_exact(place: ra.Layout) -> None:
    cp = context(4, layout="zigzag")
    own = cp.plan(FULL)
    for mask in (FULL, WINDOW):
        plan = cp.plan(mask, layout=place)
        assert plan.layout is place
        assert cp.plan(mask, layout=place) is plan
        check_exact(plan)
    assert cp.plan(FULL) is own


def _on_rank(rank: int, world: int, group: Any) -> list[dict[str, torch.Tensor]]:
    plans = context(group).plans(STACK)
    x = draw_inputs(FULL.seq_len, (4, 2), 1)
    results = []
    for plan in plans:
        local = attend(plan, x)  # sharded by one plan, attended by another
        whole = {name: plans[0].unshard(tensor) for name, tensor in local.items()}
        results.append(whole)
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_real_ranks(world: int) -> None:
    want = {mask: _reference(mask) for mask in (FULL, WINDOW)}
    for layers in run_ranks(world, _on_rank):
        for mask, got in zip(STACK, layers, strict=True):
            for name, tensor in got.items():
                torch.testing.assert_close(
                    tensor, getattr(want[mask], name), rtol=1e-10, atol=1e-10
                )


def test_memory_limits_bind_the_whole_stack() -> None:
    plans = long_context("h100_sxm").plans([LONG_WINDOW, LONG])
    need = max(plan.peak_bytes(rank) for plan in plans for rank in range(2))
    limited = long_context("h100_sxm", memory_limit=need - 1).plans([LONG_WINDOW, LONG])
    assert max(plan.peak_bytes(rank) for plan in limited for rank in range(2)) < need
    with pytest.raises(UserError, match="memory_limit=10"):
        long_context("h100_sxm", memory_limit=10).plans([LONG_WINDOW, LONG])


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda cp: cp.plans([]), r"masks=\[\]"),
        (lambda cp: cp.plans([FULL, masks.causal(7)]), r"masks of \[7, 131\] tokens"),
        (lambda cp: cp.plan(FULL, layout=layouts.zigzag(131, 2)), "layout for 2 ranks"),
        (lambda cp: cp.plan(FULL, layout=layouts.zigzag(130, 4)), "layout for 130 tokens"),
    ],
)
def test_refusals(ask: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ask(context(4))

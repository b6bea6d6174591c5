"""Backwards that start from what the forward left: exact, proved, and with fewer bytes."""

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn import PlanError
from ringattn.verify import verify_schedule
from tests.closeness import rel_error
from tests.core.cases import HEADS, LAYOUTS, inputs, mask_of
from tests.core.exactness import TOLERANCE, assert_exact, relative_errors, simulate_plan
from tests.ranks import run_ranks

METHODS = {"ulysses": {}, "usp": {"u": 2}, "loongtrain": {"u": 2}, "hybrid": {"u": 2}}
MASKS = ["causal", "documents_causal", "strided_bands", "per_head", "routed_per_head"]


def _plan(group, method: str, mask: str, layout: str, world: int, **options: int) -> ra.Plan:
    made = LAYOUTS[layout](mask_of(mask), world)
    context = ra.ContextParallel(
        group, heads=(HEADS, 2), head_dim=8, dtype=torch.float64, method=method, layout=made,
        options=METHODS[method] | options, ranks_per_node=2,
    )  # fmt: skip
    return context.plan(mask_of(mask))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["zigzag", "zero_tokens", "striped"])
def test_saved_slots_give_the_same_gradients(method: str, mask: str, layout: str) -> None:
    x = inputs(mask_of(mask).seq_len, 2, 2)
    want = ra.reference(*x.tensors[:3], mask_of(mask), x.dout)
    plan = _plan(4, method, mask, layout, 4, save=1)
    ra.verify(plan)
    assert_exact(relative_errors(simulate_plan(plan, x), want))
    plain = _plan(4, method, mask, layout, 4)
    for rank in range(4):
        assert plan.bytes(rank, "forward") == plain.bytes(rank, "forward")
        assert plan.bytes(rank, "backward") <= plain.bytes(rank, "backward")
    assert plan.digest != plain.digest


def _gradients(rank: int, world: int, group: dist.ProcessGroup, method: str, mask: str) -> list:
    plan = _plan(group, method, mask, "zigzag", world, save=1)
    x = inputs(mask_of(mask).seq_len, 2, 2)
    fabric = plan.context.fabric(torch.device("cpu"))
    leaves = [plan.shard(t).requires_grad_() for t in (x.q, x.k, x.v)]
    q, k, v = leaves
    out = ra.attention(q, k, v, plan)
    # Another call in between uses the context's memory again.
    ra.attention(2 * q.detach(), k.detach(), v.detach(), plan)
    out.backward(plan.shard(x.dout))
    planned = 2 * plan.bytes(rank, "forward") + plan.bytes(rank, "backward")
    assert fabric.received_bytes == 2 * planned
    return [plan.unshard(t.grad) for t in leaves if t.grad is not None]


@pytest.mark.parametrize("method, world", [("ulysses", 2), ("usp", 4), ("hybrid", 4)])
@pytest.mark.parametrize("mask", ["causal", "per_head"])
def test_saved_slots_outlive_other_calls_on_real_ranks(method: str, world: int, mask: str) -> None:
    x = inputs(mask_of(mask).seq_len, 2, 2)
    want = ra.reference(*x.tensors[:3], mask_of(mask), x.dout)
    for result in run_ranks(world, _gradients, method, mask):
        for got, name in zip(result, ("dq", "dk", "dv"), strict=True):
            assert rel_error(getattr(want, name), got) <= TOLERANCE, name


def test_a_backward_that_waits_for_queries_in_vain_is_refused() -> None:
    """The saved queries are there: that the gradients of a row never came must still be seen."""
    plan = _plan(4, "ulysses", "causal", "zigzag", 4, save=1)
    forward = verify_schedule(plan.forward, plan.mask, plan.layout)
    with pytest.raises(PlanError, match="needs its forward"):
        verify_schedule(plan.backward, plan.mask, plan.layout)
    moves = plan.backward.moves.copy()
    first = int((moves["skip"] == 1).argmax())
    for broken in ([m for m in range(len(moves)) if m != first], None):
        part = moves.copy()
        if broken is None:
            part["s0"][first] += 1
            part["rows"][first] -= 1
        else:
            part = part[broken]
        object.__setattr__(plan.backward, "moves", part)
        with pytest.raises(PlanError):
            verify_schedule(plan.backward, plan.mask, plan.layout, forward)

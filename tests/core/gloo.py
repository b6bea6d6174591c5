"""What a real rank runs for the tests: a case by autograd, its bytes, and a second run."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import ringattn as ra
from tests.core.cases import Case, Inputs, inputs_of, plan_of

Results = dict[str, torch.Tensor]


def attend(plan: ra.Plan, x: Inputs) -> Results:
    """This rank's out, lse, dq, dk, dv (and dsinks) by autograd through the operator."""
    q, k, v = (plan.shard(t).requires_grad_() for t in (x.q, x.k, x.v))
    sinks = None if x.sinks is None else x.sinks.clone().requires_grad_()
    out = ra.attention(q, k, v, plan, softcap=x.softcap, sinks=sinks)
    out.backward(plan.shard(x.dout))
    names = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if sinks is not None:
        names["dsinks"] = sinks.grad
    return {name: tensor for name, tensor in names.items() if tensor is not None}


def run_case(
    group: dist.ProcessGroup,
    case: Case,
    x: Inputs | None = None,
    make: Callable[..., ra.Plan] = plan_of,
    **options: Any,
) -> Results:
    """Whole tensors of one case as this rank sees them, on the CPU; checks bytes, bits and shards.

    dsinks is the sum over ranks; lse comes from a forward without autograd. `make` makes the plan.
    """
    plan = make(case, group, **options)
    device = plan.context.device
    x = _on(x or inputs_of(case), device)
    fabric = plan.context.fabric(device)
    rank, batch = dist.get_rank(group), x.q.shape[0]
    local = attend(plan, x)
    planned = batch * (plan.bytes(rank, "forward") + plan.bytes(rank, "backward"))
    assert fabric.received_bytes == planned, f"{fabric.received_bytes} bytes, planned {planned}"
    scale = 1 / math.sqrt(x.q.shape[-1])
    q, k, v = (plan.shard(t) for t in (x.q, x.k, x.v))
    blocks = None if plan.mask.routing is None else ra.route(q, k, plan)
    out, lse, _ = plan.run_forward(q, k, v, x.sinks, scale, x.softcap, blocks)
    assert fabric.received_bytes == planned + batch * plan.bytes(rank, "forward")
    assert torch.equal(out, local["out"]), "a forward without autograd gave other bits"
    for name, again in attend(plan, x).items():
        assert torch.equal(local[name], again), f"{name}: the second run gave other bits"
    dsinks = local.pop("dsinks", None)
    whole = {name: plan.unshard(t) for name, t in (local | {"lse": lse}).items()}
    for name, tensor in local.items():
        assert torch.equal(plan.shard(whole[name]), tensor), f"{name}: unshard moved rows"
    if dsinks is not None:
        dist.all_reduce(dsinks, group=group)
        whole["dsinks"] = dsinks
    return {name: tensor.cpu() for name, tensor in whole.items()}


def _on(x: Inputs, device: torch.device) -> Inputs:
    sinks = None if x.sinks is None else x.sinks.to(device)
    return Inputs(*(t.to(device) for t in x.tensors), sinks=sinks, softcap=x.softcap)


def run_cases(
    rank: int,
    world: int,
    group: dist.ProcessGroup,
    cases: list[Case],
    make: Callable[..., ra.Plan] = plan_of,
) -> list[Results]:
    """`run_case` for each case."""
    del rank, world
    results = []
    for case in cases:
        try:
            results.append(run_case(group, case, make=make))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    return results

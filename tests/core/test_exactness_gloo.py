"""Plans over real gloo ranks through autograd, against reference, simulator and planned bytes."""

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ringattn as ra
from tests.closeness import rel_error
from tests.core.cases import (
    AXES,
    KERNELS,
    LAYOUTS,
    MASKS,
    METHOD_NAMES,
    Case,
    inputs_of,
    mask_of,
    mixed,
    plan_of,
    reference_of,
)
from tests.core.exactness import TOLERANCE, assert_exact, simulate_plan
from tests.core.gloo import Results, run_case, run_cases
from tests.grid import run_grid
from tests.pairwise import pairwise
from tests.ranks import run_ranks


@cache
def _covering() -> list[Case]:
    """Made on demand: the ranks, which import this module, do without it."""
    return pairwise(AXES)


def _errors(case: Case, by_rank: list[Results]) -> dict[str, float]:
    """Errors of a case; every rank must hold the same tensors."""
    want, first = reference_of(case), by_rank[0]
    for rank, result in enumerate(by_rank):
        assert result.keys() == first.keys()
        for name, tensor in result.items():
            assert torch.equal(tensor, first[name]), f"{case}: rank {rank} holds another {name}"
    return {name: rel_error(getattr(want, name), tensor) for name, tensor in first.items()}


def _check_like_simulated(case: Case, result: Results) -> None:
    simulated = simulate_plan(plan_of(case), inputs_of(case))
    for name in result.keys() - {"dsinks"}:
        assert torch.equal(result[name], getattr(simulated, name)), (
            f"{case}: {name} unlike simulated"
        )


@pytest.mark.parametrize("world", AXES["world"])
def test_a_covering_part_of_the_product(world: int) -> None:
    cases = [case for case in _covering() if case["world"] == world]
    by_rank = run_ranks(world, run_cases, cases)
    for case, *results in zip(cases, *by_rank, strict=True):
        assert {"out", "lse", "dq", "dk", "dv"} <= results[0].keys()
        assert ("dsinks" in results[0]) == case["kernel"].endswith("+sinks")
        try:
            assert_exact(_errors(case, results))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
        _check_like_simulated(case, results[0])


@pytest.mark.full
@pytest.mark.timeout(8 * 3600)
def test_the_whole_product(grid_seconds: float | None) -> None:
    names = ("world", "mask", "layout", "method", "group")
    values = itertools.product(AXES["world"], MASKS, LAYOUTS, METHOD_NAMES, AXES["group"])
    # The extras are exercised by the simulated product; they travel with the cases in turn.
    cases = [
        dict(zip(names, v, strict=True)) | {"batch": 1, "kernel": KERNELS[index % len(KERNELS)]}
        for index, v in enumerate(values)
    ]

    def check(case: Case) -> dict[str, float]:
        by_rank = run_ranks(case["world"], run_cases, [case])
        return _errors(case, [results[0] for results in by_rank])

    run_grid("attention_gloo", mixed(cases), check, tolerance=TOLERANCE, seconds=grid_seconds)


def _on_a_mesh(
    rank: int, world: int, group: dist.ProcessGroup, case: Case
) -> tuple[int, Results, Results]:
    """The case over one axis of a 2 × 2 mesh, and over the other."""
    del group
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "cp"))
    by_mesh = ra.ContextParallel(mesh["cp"], heads=(4, 1), head_dim=8)
    assert (by_mesh.world, by_mesh.rank) == (2, rank % 2)
    along_cp, along_dp = (run_case(mesh[axis].get_group(), case) for axis in ("cp", "dp"))
    return rank, along_cp, along_dp


def test_the_axes_of_a_mesh_are_groups_of_their_own() -> None:
    """Group ranks differ from global ranks on both axes of a 2 × 2 mesh."""
    case = _case(world=2, method="direct")
    for _, along_cp, along_dp in run_ranks(4, _on_a_mesh, case):
        assert_exact(_errors(case, [along_cp, along_dp]))


def _mesh_as_group(rank: int, world: int, group: dist.ProcessGroup, case: Case) -> Results:
    del group, rank
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    x, mask = inputs_of(case), mask_of(case["mask"])
    for given in (mesh, mesh["cp"], None):
        context = ra.ContextParallel(given, heads=(4, 1), head_dim=8, method="ring")
        plan = context.plan(mask)
        out = plan.unshard(ra.attention(plan.shard(x.q), plan.shard(x.k), plan.shard(x.v), plan))
    return {"out": out}


def test_a_device_mesh_and_the_default_group_are_groups() -> None:
    case = _case(world=2)
    by_rank = run_ranks(2, _mesh_as_group, case)
    assert_exact(_errors(case, by_rank))


def _shards(rank: int, world: int, group: dist.ProcessGroup, layout: str) -> tuple[Any, ...]:
    """Gradient of a replicated loss of the whole tensor, from this rank's rows."""
    case = _case(world=world, layout=layout)
    plan = plan_of(case, group)
    x = inputs_of(case)
    local = plan.shard(x.q).requires_grad_()
    whole = plan.unshard(local)
    (whole * x.dout).sum().backward()
    along = plan.unshard(plan.shard(x.q.transpose(0, 1), dim=0), dim=-4)
    positions = plan.positions()
    assert torch.equal(positions, plan.positions(rank))
    assert torch.equal(plan.shard(torch.arange(plan.mask.seq_len), dim=0), positions)
    assert local.grad is not None
    return whole.detach(), along.transpose(0, 1), local.grad, plan.shard(x.dout)


@pytest.mark.parametrize("layout", ["uneven", "zero_tokens", "scattered", "striped"])
def test_unshard_gathers_and_is_differentiable(layout: str) -> None:
    x = inputs_of(_case(world=3))
    for whole, along, gradient, expected in run_ranks(3, _shards, layout):
        assert torch.equal(whole, x.q)
        assert torch.equal(along, x.q)
        assert torch.equal(gradient, expected)


def _many_calls(rank: int, world: int, group: dist.ProcessGroup, case: Case) -> list[bool]:
    """Several plans of one context in turn, forwards before backwards, as layers do."""
    del rank, world
    context = ra.ContextParallel(
        group, heads=(4, 1), head_dim=8, dtype=torch.float64, method="ring", layout="zigzag"
    )
    x, equal = inputs_of(case), []
    masks = [mask_of(case["mask"]), ra.masks.causal(67), ra.masks.full(67)]
    graphs = []
    for mask in (*masks, masks[0]):
        plan = context.plan(mask)
        q, k, v = (plan.shard(t).requires_grad_() for t in (x.q, x.k, x.v))
        graphs.append((plan, (q, k, v), ra.attention(q, k, v, plan)))
    for plan, (q, k, v), out in reversed(graphs):
        out.backward(plan.shard(x.dout))
        want = ra.reference(x.q, x.k, x.v, plan.mask, x.dout)
        pairs = zip(
            (out, q.grad, k.grad, v.grad), (want.out, want.dq, want.dk, want.dv), strict=True
        )
        for got, ref in pairs:
            assert got is not None
            assert ref is not None
            equal.append(rel_error(plan.shard(ref), got.detach()) <= TOLERANCE)
    return equal


def test_saved_activations_survive_later_calls() -> None:
    """Messages and buffers of one context are reused; what autograd saved must not be."""
    for equal in run_ranks(3, _many_calls, _case(world=3)):
        assert len(equal) == 16
        assert all(equal)


def _case(**values: Any) -> Case:
    base = {
        "mask": "documents_causal",
        "layout": "zigzag",
        "method": "ring",
        "group": 4,
        "batch": 2,
        "kernel": "cpu_flash",
    }
    return base | values

"""Attention that a checkpoint remembers: gradients, how often it runs, what it keeps."""

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn import UserError
from ringattn.plan import Plan
from ringattn.selective import cheap_part
from tests.closeness import assert_close
from tests.core.cases import Case, Inputs, inputs_of, plan_of
from tests.ranks import run_ranks

CASES: dict[str, Case] = {
    "plain": {"mask": "documents_causal", "method": "direct", "kernel": "matmul"},
    "sinks": {"mask": "causal", "method": "ring", "kernel": "matmul+sinks"},
    "softcap": {"mask": "global_sliding", "method": "ring", "kernel": "matmul+softcap"},
    "head groups": {"mask": "per_head", "method": "direct", "kernel": "matmul+sinks"},
    "empty rows": {"mask": "strided_bands", "method": "all_gather", "kernel": "matmul+sinks"},
    "blocks": {"mask": "block_groups", "method": "ring", "kernel": "matmul+dims"},
    "routed": {"mask": "routed", "method": "ring", "kernel": "matmul"},
    "saved": {"mask": "causal", "method": "ulysses:save=1", "kernel": "matmul"},
    "no tokens": {"mask": "causal", "method": "direct", "kernel": "matmul",
                  "layout": "zero_tokens"},
}  # fmt: skip
NAMES = ("out", "dq", "dk", "dv", "dsinks")


def _case(name: str, world: int) -> Case:
    return {"layout": "zigzag", "world": world, "group": 1, "batch": 2} | CASES[name]


def _run(plan: Plan, x: Inputs, attend: Any) -> list[torch.Tensor]:
    """out and gradients of a small layer whose q, k and v are computed again."""
    leaves = [plan.shard(t).requires_grad_() for t in (x.q, x.k, x.v)]
    if x.sinks is not None:
        leaves.append(x.sinks.clone().requires_grad_())

    def layer(q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
        return attend(q.sin(), k * 1.5, v.cos(), sinks) * 2

    out = checkpoint(layer, *leaves, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    return [out.detach(), *torch.autograd.grad(out, leaves, plan.shard(x.dout))]


def _plain(plan: Plan, softcap: float | None, q: Any, k: Any, v: Any, sinks: Any) -> torch.Tensor:
    return ra.attention(q, k, v, plan, softcap=softcap, sinks=sinks)


def _remembered(plan: Plan, x: Inputs, share: float) -> tuple[list[torch.Tensor], list[Plan]]:
    """Results by `Recall`, and the plans whose forward ran."""
    ran: list[Plan] = []
    forward = Plan.run_forward

    def counted(self: Plan, *arguments: Any) -> Any:
        ran.append(self)
        return forward(self, *arguments)

    recall = ra.Recall(share=share)
    with mock.patch.object(Plan, "run_forward", counted):
        got = _run(plan, x, lambda q, k, v, s: recall(q, k, v, plan, softcap=x.softcap, sinks=s))
    return got, ran


def _compare(rank: int, world: int, group: dist.ProcessGroup, names: list[str]) -> None:
    del rank
    for name in names:
        case = _case(name, world)
        plan, x = plan_of(case, group), inputs_of(case)
        want = _run(plan, x, partial(_plain, plan, x.softcap))
        got, ran = _remembered(plan, x, 0.0)
        assert ran == [plan], "attention ran again"
        for what, a, b in zip(NAMES, want, got):
            assert torch.equal(a, b), f"{name}: {what}"
        if plan.forward.saved:
            continue
        for share in (0.3, 1.0):
            got, ran = _remembered(plan, x, share)
            part = cheap_part(plan, share)
            assert ran == [plan] if part.plan is None else [plan, part.plan]
            for what, a, b in zip(NAMES, want, got):
                assert_close(f"{name} {share} {what}", a, b, 1e-12)


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_are_those_of_attention(world: int) -> None:
    """The same bits where every row is kept; attention then runs once."""
    run_ranks(world, _compare, list(CASES))


def _kept(rank: int, world: int, group: dist.ProcessGroup) -> list[list[tuple[int, ...]]]:
    del rank
    case = _case("plain", world)
    plan, x = plan_of(case, group), inputs_of(case)
    found = []
    for share in (0.0, 0.3, 1.0):
        kept: list[tuple[int, ...]] = []

        def put(tensor: torch.Tensor, kept: list = kept) -> Any:
            kept.append(tuple(tensor.shape))
            return lambda: tensor

        recall = ra.Recall(share=share, put=put)
        _run(plan, x, lambda q, k, v, s, recall=recall: recall(q, k, v, plan))
        found.append(kept)
    return found


def test_cheap_rows_are_not_kept() -> None:
    for all_rows, some, none in run_ranks(2, _kept):
        assert all_rows[0][1] in (33, 34)
        assert 0 < some[0][1] < 25
        assert some[1][1] == some[0][1]
        assert none[0][1] == 0


def _misplaced(rank: int, world: int, group: dist.ProcessGroup, mutate: bool) -> None:
    """Kept rows are put where their neighbours were."""
    del rank
    case = _case("plain", world)
    plan, x = plan_of(case, group), inputs_of(case)
    want = _run(plan, x, partial(_plain, plan, None))
    recall = ra.Recall(share=0.3)

    def attend(q: Any, k: Any, v: Any, _: Any) -> Any:
        out = recall(q, k, v, plan)
        kept = recall._kept
        if mutate and kept is not None and kept.rows is not None:
            recall._kept = replace(kept, rows=kept.rows.roll(1))
        return out

    got = _run(plan, x, attend)
    for what, a, b in zip(NAMES, want, got):
        assert_close(what, a, b, 1e-12)


def test_rows_from_a_wrong_place_are_seen() -> None:
    run_ranks(2, _misplaced, False)
    with pytest.raises(AssertionError, match="relative error"):
        run_ranks(2, _misplaced, True)


def _refusal(rank: int, world: int, group: dist.ProcessGroup) -> str:
    del rank
    case = _case("saved", world)
    plan, x = plan_of(case, group), inputs_of(case)
    q, k, v = (plan.shard(t) for t in (x.q, x.k, x.v))
    try:
        ra.Recall(share=0.5)(q, k, v, plan)
    except UserError as error:
        return str(error)
    return "accepted"


def test_a_share_of_saved_slots_is_refused() -> None:
    for message in run_ranks(2, _refusal):
        assert "saves q, k and v of its heads" in message

"""Attention over a plan as one opaque operator, with autograd and `torch.compile` support.

`ringattn::attention(q, k, v, sinks?, plan, scale, softcap) -> (out, lse)`. The integer names a
live plan; what is saved for the backward keeps that plan alive.
"""

import itertools
import math
import weakref
from typing import TYPE_CHECKING

import torch

from ringattn.checks import check_blocks, check_scale, check_softcap, is_plan, is_routed
from ringattn.errors import UserError
from ringattn.routing import selection_shape

if TYPE_CHECKING:
    from ringattn.plan import Plan

# The one piece of module state: integer handles of live plans, so that a graph can name a plan.
_PLANS: "weakref.WeakValueDictionary[int, Plan]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


def register(plan: "Plan") -> int:
    """Gives a plan the integer by which the operator finds it, for as long as the plan lives."""
    handle = next(_NUMBERS)
    _PLANS[handle] = plan
    return handle


def _plan(handle: int) -> "Plan":
    plan = _PLANS.get(handle)
    if plan is None:
        raise UserError(
            f"plan handle {handle}",
            "names no live plan",
            "keep the plan object until the step ends",
        )
    return plan


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: "Plan",
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
    blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact softmax attention of this rank's queries over the whole sequence.

    Every rank of the plan's group must call it, in the same order; ranks exchange keys, values and
    partial results as the plan says. Differentiable in q, k, v and sinks.

    Args:
        q: (B, T, Hq, D), this rank's tokens in layout order (`plan.shard`).
        k, v: (B, T, Hkv, D) and (B, T, Hkv, E). Hq is a multiple of Hkv.
        plan: from `ContextParallel.plan`.
        scale: multiplies the logits; finite, not 0; 1 / sqrt(D) by default.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: (Hq,) learned logits that join every row's denominator.
        blocks: for a plan of a routed mask, the selected blocks of `route`, equal on all ranks;
            made here by default.
        dropout: must be 0. Ranks would have to draw the same mask for a pair whoever computes it.

    Returns:
        (B, T, Hq, E) in q's dtype. Rows that may attend nothing are 0.

    Raises:
        UserError: shapes, dtype or device do not fit the plan.
        CommunicationError: a move failed or timed out; names rank, step and move.
    """
    check_scale(scale)
    check_softcap(softcap)
    if dropout:
        raise UserError(
            f"dropout={dropout}",
            "attention dropout is not supported: partial results would need one random stream",
            "pass 0 and drop elsewhere in the model",
        )
    is_plan(plan)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if plan.mask.routing is not None and blocks is None:
        blocks = route(q, k, plan)
    if blocks is not None and not isinstance(blocks, torch.Tensor):
        raise UserError(
            f"blocks of type {type(blocks).__name__}",
            "must be an int32 tensor",
            "pass what ringattn.route gives",
        )
    saved = plan.saved_numel * q.shape[0]
    return _attention(q, k, v, sinks, plan.handle, scale, softcap or 0.0, blocks, saved)[0]


def route(q: torch.Tensor, k: torch.Tensor, plan: "Plan") -> torch.Tensor:
    """Selects the blocks of keys that each block of queries attends, under a routed mask.

    `attention` does it by itself; call it to look at a selection, to change it, or to reuse it.
    Every rank of the plan's group must call it; averages of blocks are gathered. No gradient.

    Args:
        q: (B, T, Hq, D). k: (B, T, Hkv, D), this rank's tokens in layout order.
        plan: of a `ringattn.masks.routed`.

    Returns:
        int32 (B, selecting heads, nq, top_k), equal on all ranks: ascending blocks of keys of each
        block of queries, then -1. Selecting heads are Hq with `per_head`, else Hkv.

    Raises:
        UserError: the plan's mask selects no blocks, or shapes do not fit.
    """
    is_plan(plan)
    is_routed(plan.mask)
    shape = selection_shape(plan.mask, q.shape[2], k.shape[2])
    return _select_blocks(q.detach(), k.detach(), plan.handle, *shape)


@torch.library.custom_op("ringattn::select_blocks", mutates_args=())
def _select_blocks(
    q: torch.Tensor, k: torch.Tensor, plan: int, heads: int, rows: int, top_k: int
) -> torch.Tensor:
    return _plan(plan).select_blocks(q, k)


@_select_blocks.register_fake
def _(q, k, plan, heads, rows, top_k):
    return q.new_empty((q.shape[0], heads, rows, top_k), dtype=torch.int32)


@torch.library.custom_op("ringattn::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: int,
    scale: float,
    softcap: float,
    blocks: torch.Tensor | None = None,
    saved_numel: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = _plan(plan)
    found.check(q, k, v, sinks)
    check_blocks(found.mask, q, k, blocks)
    return found.run_forward(q, k, v, sinks, scale, softcap or None, blocks)


@_attention.register_fake
def _(q, k, v, sinks, plan, scale, softcap, blocks=None, saved_numel=0):
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(q.shape[:3], dtype=accumulator), q.new_empty(saved_numel)


@torch.library.custom_op("ringattn::attention_backward", mutates_args=())
def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: int,
    scale: float,
    softcap: float,
    blocks: torch.Tensor | None = None,
    saved: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    dsinks = q.new_empty(0)
    if sinks is not None:
        # d lse / d sink = exp(sink - lse); its rows also receive the gradient of lse itself.
        weight = torch.exp(sinks.to(lse.dtype) - lse)
        dsinks = (weight * (-delta if dlse is None else dlse - delta)).sum((0, 1)).to(sinks.dtype)
    if dlse is not None:
        delta -= dlse
    dq, dk, dv = _plan(plan).run_backward(
        dout, q, k, v, lse, delta, scale, softcap or None, blocks, saved
    )
    return dq, dk, dv, dsinks


@_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, sinks, plan, scale, softcap, blocks=None, saved=None):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        dsinks,
    )


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, sinks, handle, scale, softcap, blocks, _ = inputs
    out, lse, saved = output
    ctx.save_for_backward(q, k, v, sinks, out, lse, blocks, saved)
    ctx.set_materialize_grads(False)  # else zeros as large as lse and saved
    ctx.handle, ctx.scale, ctx.softcap = handle, scale, softcap
    # Keeps the plan alive until the backward has run. A graph traced for any plan (its handle is
    # symbolic) has no plan to keep: there the caller holds it.
    ctx.plan = _PLANS.get(handle) if isinstance(handle, int) else None


def _backward(ctx, dout, dlse, dsaved):
    q, k, v, sinks, out, lse, blocks, saved = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = _attention_backward(
        dout, dlse, q, k, v, out, lse, sinks, ctx.handle, ctx.scale, ctx.softcap, blocks, saved
    )
    return dq, dk, dv, dsinks if sinks is not None else None, *[None] * 5


_attention.register_autograd(_backward, setup_context=_setup_context)

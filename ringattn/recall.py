"""Attention that is computed once and remembered when a checkpoint computes its inputs again."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from ringattn.checks import check_scale, check_softcap, is_plan
from ringattn.errors import UserError
from ringattn.operators import _attention, _attention_backward, route
from ringattn.selective import Part, cheap_part

if TYPE_CHECKING:
    from ringattn.plan import Plan

Get = Callable[[], torch.Tensor]
Put = Callable[[torch.Tensor], Get]
"""Keeps a tensor somewhere and returns how to get it back."""


def _hold(tensor: torch.Tensor) -> Get:
    return lambda: tensor


@dataclass(frozen=True, eq=False)
class _Kept:
    """What a forward leaves: rows of out and lse, the slots that the plan saves, the selection."""

    rows: torch.Tensor | None
    out: Get
    lse: Get
    saved: Get
    blocks: torch.Tensor | None


class Recall:
    """`ringattn.attention` for a layer inside an activation checkpoint.

    The first call computes attention and keeps out and lse. Further calls, with q, k and v that
    were computed again, return what was kept: their backward is that of attention itself, from the
    new q, k, v and the kept out and lse. So no attention runs twice, except for the rows that
    `share` lets be cheap: those are not kept, and a plan of their part of the mask computes them
    again. One object serves one attention of one forward; every rank of the plan's group makes the
    same calls in the same order.

    Args:
        share: of the attention forward that may be computed again (`ringattn.selective`).
        put: where the kept tensors go, e.g. to host memory; by default they stay.

    Raises:
        UserError: a `share` for a plan that saves q, k and v of its heads: these are in the order
            of no shard, and larger than what leaving rows out can gain.
    """

    def __init__(self, *, share: float = 0.0, put: Put = _hold) -> None:
        self._share, self._put = share, put
        self._kept: _Kept | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: "Plan",
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        blocks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments, result and errors are those of `ringattn.attention`, without dropout."""
        check_scale(scale)
        check_softcap(softcap)
        is_plan(plan)
        scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
        call = plan, scale, softcap or 0.0
        with torch.no_grad():
            if self._kept is None:
                out, lse, saved, blocks = self._first(q, k, v, sinks, blocks, call)
            else:
                out, lse, saved, blocks = self._again(q, k, v, sinks, self._kept, call)
        result = _Remembered.apply(q, k, v, sinks, out, lse, blocks, saved, call)
        assert isinstance(result, torch.Tensor)
        return result

    def _first(self, q, k, v, sinks, blocks, call):
        """Attention of all rows, the expensive ones kept."""
        plan, scale, softcap = call
        if self._share and plan.forward.saved:
            raise UserError(
                f"share={self._share} for a plan that saves q, k and v of its heads",
                "what it keeps already is more than rows left out can gain",
                "plan without the option save, or keep every row",
            )
        if plan.mask.routing is not None and blocks is None:
            blocks = route(q, k, plan)
        numel = plan.saved_numel * q.shape[0]
        out, lse, saved = _attention(q, k, v, sinks, plan.handle, scale, softcap, blocks, numel)
        rows = None
        if (part := self._part(plan)) is not None:
            rows = part.kept_rows(plan, q.device)
        kept = (out, lse) if rows is None else (out[:, rows], lse[:, rows])
        put = self._put
        self._kept = _Kept(rows, put(kept[0]), put(kept[1]), put(saved), blocks)
        return out, lse, saved, blocks

    def _again(self, q, k, v, sinks, kept: _Kept, call):
        """The kept rows, and the others computed again."""
        plan, scale, softcap = call
        part = self._part(plan)
        if part is None or part.plan is None or kept.rows is None:
            return kept.out(), kept.lse(), kept.saved(), kept.blocks
        out, lse, _ = _attention(q, k, v, sinks, part.plan.handle, scale, softcap)
        out.index_copy_(1, kept.rows, kept.out())
        lse.index_copy_(1, kept.rows, kept.lse())
        return out, lse, kept.saved(), kept.blocks

    def _part(self, plan: "Plan") -> Part | None:
        part = cheap_part(plan, self._share) if self._share else None
        return part if part is not None and part.plan is not None else None


class _Remembered(torch.autograd.Function):
    """Returns `out`; its backward is that of the attention that gave out and lse.

    First and later calls save equal tensors, as a checkpoint asks.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, out, lse, blocks, saved, call):
        ctx.save_for_backward(q, k, v, sinks, out, lse, blocks, saved)
        ctx.call = call
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, sinks, out, lse, blocks, saved = ctx.saved_tensors
        plan, scale, softcap = ctx.call
        dq, dk, dv, dsinks = _attention_backward(
            dout,
            None,
            q, k, v, out, lse, sinks,
            plan.handle, scale, softcap, blocks, saved,
        )  # fmt: skip
        return dq, dk, dv, dsinks if sinks is not None else None, *[None] * 5

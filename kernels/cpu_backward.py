"""Attention backward of a list of calls for a window of heads: by the CPU flash op or by products.

The op's bfloat16 backward pays from 768 query rows on, where it splits rows by 256; everything
smaller goes to `cpu_products`. In other dtypes the op is the faster one at every size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ringattn.kernels.cpu_calls import Call
from ringattn.kernels.cpu_products import ProductOperands, Workspace, add_gradients
from ringattn.kernels.cpu_views import (
    add_to_keys,
    batch_rows,
    key_blocks,
    query_blocks,
    unit_stride,
)
from ringattn.kernels.heads import head_parts
from ringattn.kernels.merge import accumulator_dtype
from ringattn.kernels.stand_in import stand_in_out

_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

OP_ROWS = 768
OP_KEYS = 256
EXACT_SCORES = 1 << 18
"""In bfloat16, a launch of fewer scores per head takes its products in float32: where a row meets
so few others, rounding each partial gradient would show."""

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _OpOperands(NamedTuple):
    """Operands of the backward op in one dtype, (B, rows, heads, dim)."""

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor


def add_window_gradients(
    calls: Sequence[Call],
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grads: Gradients,
    scale: float,
) -> None:
    """Adds the calls' gradients to grads = (dq, dk, dv), in place.

    Shapes as in `ringattn.kernels.base`, for the same window of heads throughout; lse holds +inf
    for rows without keys.
    """
    wide = accumulator_dtype(q.dtype)
    narrow = q.dtype if q.dtype == torch.bfloat16 else wide
    small = [call for call in calls if narrow != wide and _is_small(call)]
    large = [call for call in calls if narrow == wide or not _is_small(call)]
    dout_wide = _head_major(dout, wide)
    if large:
        op_dout, op_out = stand_in_out(dout_wide, delta)
        op_dout = dout if op_dout is dout_wide else op_dout
        operands = _OpOperands(*(unit_stride(x.to(narrow)) for x in (op_dout, q, k, v, op_out)))
        for call in large:
            _add_by_op(call, operands, lse, grads, scale)
    if small:
        if _scores(calls) < EXACT_SCORES:
            narrow = wide
        products = ProductOperands(
            q=_head_major(q, wide),
            k=_head_major(k, wide),
            v=_head_major(v, wide),
            dout=dout_wide,
            q_narrow=_head_major(q, narrow),
            k_narrow=_head_major(k, narrow),
            dout_narrow=_head_major(dout, narrow),
            lse=lse,
            delta=delta,
        )
        work = Workspace.allocate(wide, narrow)
        for call in small:
            mask = call.mask
            mask = None if mask is None else mask.to(wide)
            for heads, key_heads in head_parts(call.h0, call.h1, q.shape[2] // k.shape[2]):
                add_gradients(call, mask, products, grads, heads, key_heads, scale, work)


def _is_small(call: Call) -> bool:
    """Whether the bfloat16 op loses to products."""
    return call.rows < OP_ROWS or call.keys < OP_KEYS


def _scores(calls: Sequence[Call]) -> int:
    """Scores per head, counting masked blocks in full."""
    return sum(call.count * call.rows * call.keys for call in calls)


def _head_major(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (B, T, H, D) in some dtype with the rows of a head next to each other in memory."""
    batch, rows, heads, dim = x.shape
    if x.dtype == dtype and x.stride()[1:] == (dim, rows * dim, 1):
        return x
    return x.new_empty((batch, heads, rows, dim), dtype=dtype).transpose(1, 2).copy_(x)


def _add_by_op(
    call: Call, x: _OpOperands, lse: torch.Tensor, grads: Gradients, scale: float
) -> None:
    mask = call.mask
    mask = None if mask is None else mask.to(x.q.dtype)
    for heads, key_heads in head_parts(call.h0, call.h1, x.q.shape[2] // x.k.shape[2]):
        for batch in batch_rows(call, x.q.shape[0]):
            dq, dk, dv = _backward_op(
                query_blocks(x.dout, batch, call, heads),
                query_blocks(x.q, batch, call, heads),
                key_blocks(x.k, batch, call, key_heads),
                key_blocks(x.v, batch, call, key_heads),
                query_blocks(x.out, batch, call, heads),
                query_blocks(lse, batch, call, heads),
                0.0,
                call.causal,
                attn_mask=mask,
                scale=scale,
            )
            query_blocks(grads[0], batch, call, heads).add_(dq)
            add_to_keys(grads[1], dk, batch, call, key_heads)
            add_to_keys(grads[2], dv, batch, call, key_heads)

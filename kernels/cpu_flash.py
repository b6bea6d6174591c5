"""Local attention over PyTorch's CPU flash op: native grouped queries, any tile list.

The op (aten ``_scaled_dot_product_flash_attention_for_cpu`` and its backward) knows rectangles and
additive masks, overwrites its result and recomputes delta from `out`. Around it:

- `build_calls` cuts bands into rectangles and small masked blocks, equal ones batched as views.
- 16-bit inputs run forward in float32: the op is as fast there, and partial results are not
  rounded before they are merged.
- bfloat16 inputs run backward in bfloat16 where a call is large enough to gain from it; shorter
  calls, float16 and float32 run in float32.
- The backward is given an `out` made so that rowsum(dout * out) is the global delta.
"""

from typing import NamedTuple

import numpy as np
import torch

from ringattn.kernels.cpu_calls import Call, build_calls
from ringattn.kernels.cpu_products import ProductOperands, Workspace, add_gradients
from ringattn.kernels.cpu_views import add_to_keys, batch_rows, key_blocks, query_blocks
from ringattn.kernels.heads import head_parts
from ringattn.kernels.merge import NO_KEY, accumulator_dtype, merge_partial

_forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

BF16_BACKWARD_ROWS = 768
"""The op splits query rows by 256 from here on; below, its bfloat16 backward is the slower one."""
BF16_BACKWARD_KEYS = 256


class _Gradients(NamedTuple):
    """Operands of the backward op in one dtype, (B, rows, heads, dim)."""

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor


def _mask(call: Call, dtype: torch.dtype) -> torch.Tensor | None:
    if call.allowed is None:
        return None
    return torch.zeros(call.allowed.shape, dtype=dtype).masked_fill_(~call.allowed, NO_KEY)


def _dense_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _head_major(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (B, T, H, D) in another dtype with the rows of a head next to each other in memory."""
    shape = (x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    return x.new_empty(shape, dtype=dtype).transpose(1, 2).copy_(x)


def stand_in_out(dout: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dout', out') with rowsum(dout' * out') = delta, for an op that recomputes delta.

    out' = dout * delta / |dout|^2, with rows divided by their largest entry first because the
    square underflows for small gradients. dout' is dout, except that a zero row whose delta is not
    zero (a gradient of lse alone) gets one entry too small to matter elsewhere.
    """
    top = dout.abs().amax(-1, keepdim=True)
    delta = delta.unsqueeze(-1)
    silent = (top == 0) & (delta != 0)
    if bool(silent.any()):
        tiny = torch.finfo(dout.dtype).tiny ** 0.5
        dout = dout.clone()
        dout[..., :1].masked_fill_(silent, tiny)
        top = top.masked_fill(silent, tiny)
    unit = dout / top.masked_fill(top == 0, 1.0)
    square = unit.square().sum(-1, keepdim=True).clamp_min_(1.0)
    return dout, unit.mul_(delta / top.masked_fill(top == 0, 1.0) / square)


class CpuFlashKernel:
    """See the module docstring. Implements `ringattn.kernels.base.Kernel`."""

    name = "cpu_flash"

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Needs the CPU, a floating dtype, equal head dims and no softcap."""
        if device != "cpu":
            return f"device {device} is not the CPU"
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {dtype} is none of float64, float32, bfloat16, float16"
        if head_dim[0] != head_dim[1]:
            return f"head dims of keys and values {head_dim} differ"
        if softcap:
            return f"softcap {softcap} is not supported by the CPU flash op"
        return None

    def prepare(self, tiles: np.ndarray, device: torch.device) -> tuple[Call, ...]:
        """The op calls of a tile table."""
        return build_calls(tiles)

    @torch.no_grad()
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: tuple[Call, ...],
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
    ) -> None:
        """See `Kernel.forward`."""
        if not prepared or q.shape[0] == 0:
            return
        dtype, group = accumulator_dtype(q.dtype), q.shape[2] // k.shape[2]
        q, k, v = (_dense_rows(x, dtype) for x in (q, k, v))
        for call in prepared:
            mask = _mask(call, dtype)
            for heads, key_heads in head_parts(call.h0, call.h1, group):
                for b in batch_rows(call, q.shape[0]):
                    part_out, part_lse = _forward_op(
                        query_blocks(q, b, call, heads),
                        key_blocks(k, b, call, key_heads),
                        key_blocks(v, b, call, key_heads),
                        0.0,
                        False,
                        attn_mask=mask,
                        scale=scale,
                    )
                    if call.dead is not None:
                        part_lse.masked_fill_(call.dead, NO_KEY)
                    into_out = query_blocks(out, b, call, heads)
                    into_lse = query_blocks(lse, b, call, heads)
                    if call.first and bool((into_lse == NO_KEY).all()):
                        into_out.copy_(part_out)
                        into_lse.copy_(part_lse)
                    else:
                        merge_partial(into_out, into_lse, part_out, part_lse)

    @torch.no_grad()
    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        prepared: tuple[Call, ...],
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
    ) -> None:
        """See `Kernel.backward`."""
        if not prepared or q.shape[0] == 0:
            return
        lse = lse.masked_fill(lse == NO_KEY, float("inf"))  # a row without keys: exp(x - inf) = 0
        grads = (dq, dk, dv)
        large = [call for call in prepared if _is_large(call)]
        small = [call for call in prepared if not _is_large(call)]
        if large:
            _backward_by_op(large, dout, q, k, v, lse, delta, grads, scale)
        if small:
            _backward_by_products(small, dout, q, k, v, lse, delta, grads, scale)


def _is_large(call: Call) -> bool:
    return call.rows >= BF16_BACKWARD_ROWS and call.keys >= BF16_BACKWARD_KEYS


def _narrow_dtype(dtype: torch.dtype) -> torch.dtype:
    """What backward products may be taken in: bfloat16 in bfloat16, the rest accumulates."""
    return dtype if dtype == torch.bfloat16 else accumulator_dtype(dtype)


def _backward_by_op(
    calls: list[Call],
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> None:
    dtype, group = _narrow_dtype(q.dtype), q.shape[2] // k.shape[2]
    dout, out = stand_in_out(dout.to(accumulator_dtype(q.dtype)), delta)
    operands = _Gradients(*(_dense_rows(x, dtype) for x in (dout, q, k, v, out)))
    for call in calls:
        mask = _mask(call, dtype)
        for heads, key_heads in head_parts(call.h0, call.h1, group):
            for b in batch_rows(call, q.shape[0]):
                grads = _backward_call(operands, lse, call, b, heads, key_heads, mask, scale)
                query_blocks(into[0], b, call, heads).add_(grads[0])
                add_to_keys(into[1], grads[1], b, call, key_heads)
                add_to_keys(into[2], grads[2], b, call, key_heads)


def _backward_by_products(
    calls: list[Call],
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> None:
    wide, narrow = accumulator_dtype(q.dtype), _narrow_dtype(q.dtype)
    operands = ProductOperands(
        q=_head_major(q, wide),
        k=_head_major(k, wide),
        v=_head_major(v, wide),
        dout=_head_major(dout, wide),
        q_narrow=_head_major(q, narrow),
        k_narrow=_head_major(k, narrow),
        dout_narrow=_head_major(dout, narrow),
        lse=lse,
        delta=delta,
    )
    work = Workspace.allocate(wide, narrow)
    for call in calls:
        mask = _mask(call, wide)
        for heads, key_heads in head_parts(call.h0, call.h1, q.shape[2] // k.shape[2]):
            add_gradients(call, mask, operands, into, heads, key_heads, scale, work)


def _backward_call(
    operands: _Gradients,
    lse: torch.Tensor,
    call: Call,
    batch: int | None,
    heads: slice,
    key_heads: slice,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward_op(
        query_blocks(operands.dout, batch, call, heads),
        query_blocks(operands.q, batch, call, heads),
        key_blocks(operands.k, batch, call, key_heads),
        key_blocks(operands.v, batch, call, key_heads),
        query_blocks(operands.out, batch, call, heads),
        query_blocks(lse, batch, call, heads),
        0.0,
        False,
        attn_mask=mask,
        scale=scale,
    )

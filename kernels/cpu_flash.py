"""Local attention over PyTorch's CPU flash op: native grouped queries, any tile list.

The op (aten ``_scaled_dot_product_flash_attention_for_cpu`` and its backward) knows rectangles and
additive masks, overwrites its result and recomputes delta from `out`. Around it:

- `build_calls` cuts bands into rectangles and masked strips, equal ones batched as views.
- 16-bit inputs run forward in float32: the op is as fast there, and partial results are not
  rounded before they are merged.
- The backward op runs in bfloat16 for bfloat16 inputs, in the accumulator dtype for others. Smaller
  bfloat16 calls are batched products (`cpu_products`), and tiny bfloat16 tiles the matmul
  kernel's, whose cost per tile is lowest.
- The backward op is given an `out` made so that rowsum(dout * out) is the global delta.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from ringattn.kernels.block_matrix import BlockTiles, Selection
from ringattn.kernels.cpu_backward import add_window_gradients
from ringattn.kernels.cpu_calls import Call, build_calls
from ringattn.kernels.cpu_cells import key_strip_cells, row_strip_cells
from ringattn.kernels.cpu_views import batch_rows, key_blocks, query_blocks, unit_stride
from ringattn.kernels.heads import head_parts, head_windows
from ringattn.kernels.matmul import MatmulKernel, PreparedTiles
from ringattn.kernels.merge import NO_KEY, accumulator_dtype, merge_partial

_forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

CAST_BYTES = 24 << 20
"""Float32 copies of 16-bit operands held at once. Larger blocks come from the system untouched at
every launch, and their page faults cost more than the casts; so heads are taken a few at a time."""

FORWARD_STRIP = 64
"""Thin strips waste few masked keys, and the forward op loses little on them."""
BACKWARD_STRIP, BACKWARD_STRIP_BF16 = 96, 192
"""Strips of keys: dk and dv of a strip are added once; only dq is added to piecewise. bfloat16's
products lose more on thin strips than the op does."""

SMALL_SCORES, BATCH = 1 << 13, 4
"""The bfloat16 backward of a tile of no more scores goes to the matmul kernel, unless this many
equal ones share a diagonal and so may become one call."""

_small_kernel = MatmulKernel()


class PreparedCalls(NamedTuple):
    """What each direction runs for one tile table.

    bfloat16 has its own backward: there the op's causal flag is the fastest way through large
    triangles, while in other dtypes it is the slowest.
    """

    forward: tuple[Call, ...]
    backward: tuple[Call, ...]
    backward_bf16: tuple[Call, ...]
    backward_small_bf16: PreparedTiles
    """Tiles whose bfloat16 backward is `MatmulKernel`'s; `backward_bf16` leaves them out."""
    blocks: PreparedTiles
    """Block tiles; `MatmulKernel` computes them in both directions."""


class CpuFlashKernel:
    """See the module docstring. Implements `ringattn.kernels.base.Kernel`."""

    name = "cpu_flash"
    reads_around = False

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

    def prepare(
        self, tiles: np.ndarray, device: torch.device, blocks: BlockTiles | None = None
    ) -> PreparedCalls:
        """The op calls of a tile table; block tiles are left to the matmul kernel."""
        small = _is_small(tiles)
        large = tiles[~small]
        return PreparedCalls(
            build_calls(tiles, partial(row_strip_cells, strip=FORWARD_STRIP)),
            build_calls(tiles, partial(key_strip_cells, strip=BACKWARD_STRIP, causal=False)),
            build_calls(large, partial(key_strip_cells, strip=BACKWARD_STRIP_BF16, causal=True)),
            _small_kernel.prepare(tiles[small], device),
            _small_kernel.prepare(tiles[:0], device, blocks),
        )

    @torch.no_grad()
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: PreparedCalls,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.forward`."""
        options = {"scale": scale, "softcap": softcap, "selection": selection}
        _small_kernel.forward(q, k, v, prepared.blocks, out, lse, **options)
        if not prepared.forward:
            return
        dtype = accumulator_dtype(q.dtype)
        copies = (q.shape[1] * (q.shape[2] // k.shape[2]) + 2 * k.shape[1]) * (q.dtype != dtype)
        for heads, key_heads in _windows(q, k, copies * dtype.itemsize):
            operands = [q[:, :, heads], k[:, :, key_heads], v[:, :, key_heads]]
            operands = [unit_stride(x.to(dtype)) for x in operands]
            into_out, into_lse = out[:, :, heads], lse[:, :, heads]
            for call in prepared.forward:
                if call.touches(heads):
                    _forward_call(call.window(heads), operands, into_out, into_lse, scale)

    @torch.no_grad()
    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        prepared: PreparedCalls,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.backward`."""
        if q.shape[0] == 0:
            return
        options = {"scale": scale, "softcap": softcap, "selection": selection}
        calls, small = prepared.backward, (prepared.blocks,)
        if q.dtype == torch.bfloat16:
            calls, small = prepared.backward_bf16, (prepared.blocks, prepared.backward_small_bf16)
        for tiles in small:
            _small_kernel.backward(dout, q, k, v, lse, delta, tiles, dq, dk, dv, **options)
        if not calls:
            return
        wide = accumulator_dtype(q.dtype)
        copies = 2 * (q.shape[1] * (q.shape[2] // k.shape[2]) + k.shape[1]) * wide.itemsize
        lse = lse.masked_fill(lse == NO_KEY, float("inf"))  # a row without keys: exp(x - inf) = 0
        for heads, key_heads in _windows(q, k, copies):
            add_window_gradients(
                [call.window(heads) for call in calls if call.touches(heads)],
                dout[:, :, heads],
                q[:, :, heads],
                k[:, :, key_heads],
                v[:, :, key_heads],
                lse[:, :, heads],
                delta[:, :, heads],
                (dq[:, :, heads], dk[:, :, key_heads], dv[:, :, key_heads]),
                scale,
            )


def _is_small(tiles: np.ndarray) -> np.ndarray:
    """bool per tile: too small for a call of its own, and without equals to share one with."""
    rows, keys = (tiles["q1"] - tiles["q0"]) // tiles["step"], tiles["k1"] - tiles["k0"]
    shape = [tiles[name] for name in ("h0", "h1", "lo", "hi", "step")]
    shape += [rows, keys, tiles["k0"] - tiles["q0"]]
    _, inverse, equals = np.unique(
        np.stack(shape, axis=1), axis=0, return_inverse=True, return_counts=True
    )
    return (rows * (keys // tiles["step"]) <= SMALL_SCORES) & (equals[inverse.ravel()] < BATCH)


def _windows(q: torch.Tensor, k: torch.Tensor, bytes_per_dim: int) -> Iterator[tuple[slice, slice]]:
    """Head windows; `bytes_per_dim` is what one key head copies per batch row and head dim."""
    bytes_per_head = max(1, q.shape[0] * q.shape[3] * bytes_per_dim)
    return head_windows(q.shape[2], k.shape[2], max(1, CAST_BYTES // bytes_per_head))


def _forward_call(
    call: Call, operands: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor, scale: float
) -> None:
    q, k, v = operands
    mask = call.mask
    mask = None if mask is None else mask.to(q.dtype)
    for heads, key_heads in head_parts(call.h0, call.h1, q.shape[2] // k.shape[2]):
        for batch in batch_rows(call, q.shape[0]):
            part_out, part_lse = _forward_op(
                query_blocks(q, batch, call, heads),
                key_blocks(k, batch, call, key_heads),
                key_blocks(v, batch, call, key_heads),
                0.0,
                False,
                attn_mask=mask,
                scale=scale,
            )
            into_out = query_blocks(out, batch, call, heads)
            into_lse = query_blocks(lse, batch, call, heads)
            if call.first and bool((into_lse == NO_KEY).all()):
                into_out.copy_(part_out)
                into_lse.copy_(part_lse)
            else:
                merge_partial(into_out, into_lse, part_out, part_lse)

"""A kernel made of a flash attention op that knows windowed sequences; flash, FA3 and FA4 are such.

`band_windows` turns tiles into calls. Around the op: partial outputs come in the inputs' dtype and
are merged in float32; gradients likewise are added up in float32; the backward gets the lse of the
whole sequence, and delta by way of a stand-in output. Blocks selected at run time are the matmul
kernel's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ringattn.kernels.band_windows import WindowCall, window_calls
from ringattn.kernels.block_bands import block_bands, routed_tiles
from ringattn.kernels.block_matrix import BlockTiles, Selection
from ringattn.kernels.cpu_views import unit_stride
from ringattn.kernels.flash_op import FlashOp, Lengths
from ringattn.kernels.heads import head_parts
from ringattn.kernels.matmul import MatmulKernel, PreparedTiles
from ringattn.kernels.merge import NO_KEY, merge_partial
from ringattn.kernels.stand_in import device_stand_in

_block_kernel = MatmulKernel()


@dataclass(frozen=True)
class PreparedWindows:
    """Calls, their lengths on the device (None for dense ones), and tiles of run-time blocks."""

    calls: tuple[tuple[WindowCall, Lengths | None], ...]
    blocks: PreparedTiles


class _Part(NamedTuple):
    """One op call: where its operands lie. `batch` is everything for a dense call."""

    batch: int | slice
    rows: slice
    keys: slice
    heads: slice
    key_heads: slice
    window: tuple[int, int]
    lengths: Lengths | None


class WindowKernel:
    """See the module docstring. Lacks only `refusal` of `ringattn.kernels.base.Kernel`.

    Args:
        name: the kernel's name.
        op: the op.
    """

    reads_around = False

    def __init__(self, name: str, op: FlashOp) -> None:
        self.name = name
        self._op = op

    def prepare(
        self, tiles: np.ndarray, device: torch.device, blocks: BlockTiles | None = None
    ) -> PreparedWindows:
        """The op calls of a tile table and of known block matrices."""
        bands = np.concatenate([tiles, block_bands(blocks)])
        calls = tuple((call, _lengths(call, device)) for call in window_calls(bands))
        return PreparedWindows(
            calls, _block_kernel.prepare(tiles[:0], device, routed_tiles(blocks))
        )

    @torch.no_grad()
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: PreparedWindows,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.forward`."""
        options = {"scale": scale, "softcap": softcap, "selection": selection}
        _block_kernel.forward(q, k, v, prepared.blocks, out, lse, **options)
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        for p in _parts(prepared, q, k):
            part_out, part_lse = self._op.forward(
                q[p.batch, p.rows, p.heads],
                k[p.batch, p.keys, p.key_heads],
                v[p.batch, p.keys, p.key_heads],
                p.lengths,
                p.window,
                scale,
            )
            merge_partial(
                out[p.batch, p.rows, p.heads],
                lse[p.batch, p.rows, p.heads],
                part_out.to(out.dtype),
                part_lse.masked_fill(part_lse.isinf(), NO_KEY).transpose(-1, -2),
            )

    @torch.no_grad()
    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        prepared: PreparedWindows,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.backward`."""
        options = {"scale": scale, "softcap": softcap, "selection": selection}
        _block_kernel.backward(dout, q, k, v, lse, delta, prepared.blocks, dq, dk, dv, **options)
        if not prepared.calls:
            return
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        dout, out = device_stand_in(dout, delta)
        lse = lse.masked_fill(lse == NO_KEY, float("inf"))  # a row without keys: exp(x - inf) = 0
        for p in _parts(prepared, q, k):
            part_dq, part_dk, part_dv = self._op.backward(
                dout[p.batch, p.rows, p.heads],
                q[p.batch, p.rows, p.heads],
                k[p.batch, p.keys, p.key_heads],
                v[p.batch, p.keys, p.key_heads],
                out[p.batch, p.rows, p.heads],
                lse[p.batch, p.rows, p.heads].transpose(-1, -2).contiguous(),
                p.lengths,
                p.window,
                scale,
            )
            dq[p.batch, p.rows, p.heads].add_(part_dq)
            dk[p.batch, p.keys, p.key_heads].add_(part_dk)
            dv[p.batch, p.keys, p.key_heads].add_(part_dv)


def _lengths(call: WindowCall, device: torch.device) -> Lengths | None:
    if call.is_dense:
        return None
    q_starts, k_starts = (torch.tensor(s, dtype=torch.int32, device=device) for s in call.starts)
    return Lengths(q_starts, k_starts, *call.longest)


def _parts(prepared: PreparedWindows, q: torch.Tensor, k: torch.Tensor) -> Iterator[_Part]:
    """All op calls. One with lengths takes no batch, so there is one for each batch row."""
    for call, lengths in prepared.calls:
        batches = [slice(None)] if lengths is None else range(q.shape[0])
        for heads, key_heads in head_parts(call.h0, call.h1, q.shape[2] // k.shape[2]):
            for batch in batches if q.shape[0] else ():
                yield _Part(
                    batch=batch,
                    rows=call.rows,
                    keys=call.keys,
                    heads=heads,
                    key_heads=key_heads,
                    window=(call.left, call.right),
                    lengths=lengths,
                )

"""Local attention over cuDNN's attention, as PyTorch wraps it.

The op (aten ``_scaled_dot_product_cudnn_attention`` and its backward) computes rectangles and
squares under their diagonal; its causal flag is aligned top-left. Tiles that fall into such cells
of some size are its, equal ones batched as views. What has a left edge (windows), and what is
small, goes to the flash kernel. cuDNN builds a graph for every new shape, which costs milliseconds
once; documents of many lengths pay it for each.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ringattn.kernels.band_windows import tight
from ringattn.kernels.block_bands import block_bands, routed_tiles
from ringattn.kernels.block_matrix import BlockTiles, Selection
from ringattn.kernels.cpu_calls import Call, build_calls
from ringattn.kernels.cpu_cells import Cell
from ringattn.kernels.cpu_views import (
    add_to_keys,
    batch_rows,
    key_blocks,
    query_blocks,
    unit_stride,
)
from ringattn.kernels.dense_cells import dense_cells, is_dense
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.gpu_limits import capability, refuse_half
from ringattn.kernels.heads import head_parts
from ringattn.kernels.lattice import LatticeTile, lattice_tiles
from ringattn.kernels.merge import merge_partial
from ringattn.kernels.stand_in import device_stand_in
from ringattn.kernels.window_kernel import PreparedWindows

SMALLEST = 64
"""Rows and keys of a cell. cuDNN before 9.0 takes no fewer rows, and none a single key."""
OLDEST_VERSION = 90000
LARGEST_DIM, LARGEST_DIM_HOPPER, HOPPER_VERSION = 128, 256, 91000


class DenseOp(Protocol):
    """One attention op over rectangles, (B, H, T, D), and lse (B, H, Tq), natural logarithm."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse). With `causal` row a attends keys b <= a."""
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) from the lse that is given and delta = rowsum(dout * out)."""
        ...


class AtenCudnn:
    """PyTorch's op. Its lse has a trailing dim of 1 (PyTorch 2.9 on) and is read densely."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DenseOp.forward`."""
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
            q,
            k,
            v,
            None,  # attn_bias
            True,  # compute_log_sumexp
            0.0,  # dropout_p
            causal,
            False,  # return_debug_mask
            scale=scale,
        )
        return out, lse.squeeze(-1)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `DenseOp.backward`."""
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous().unsqueeze(-1),
            seed,  # philox_seed
            seed,  # philox_offset
            None,  # attn_bias
            None,  # cum_seq_q
            None,  # cum_seq_k
            q.shape[2],
            k.shape[2],
            0.0,  # dropout_p
            causal,
            scale=scale,
        )


@dataclass(frozen=True)
class PreparedCudnn:
    """Calls of cuDNN, and what the flash kernel computes (run-time blocks among it)."""

    calls: tuple[Call, ...]
    rest: PreparedWindows


class CudnnKernel:
    """See the module docstring. Implements `ringattn.kernels.base.Kernel`.

    Args:
        op: the op; PyTorch's by default.
        flash: kernel of the tiles that are not dense.
    """

    name = "cudnn"
    reads_around = False

    def __init__(self, op: DenseOp | None = None, flash: FlashKernel | None = None) -> None:
        self._op = op or AtenCudnn()
        self._flash = flash or FlashKernel()

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Needs cuDNN 9 and what `flash` needs; D up to 128, up to 256 on Hopper."""
        version = torch.backends.cudnn.version() or 0
        reason = refuse_half(
            device,
            dtype,
            head_dim,
            softcap,
            largest_dim=LARGEST_DIM_HOPPER,
            equal_dims=True,
            op="cuDNN attention",
        )
        if reason is not None:
            return reason
        if version < OLDEST_VERSION:
            return f"cuDNN {version} is older than {OLDEST_VERSION}"
        wide = capability() == (9, 0) and version >= HOPPER_VERSION
        if head_dim[0] > LARGEST_DIM and not wide:
            return (
                f"head dims {head_dim} are above {LARGEST_DIM} with cuDNN {version} "
                f"on compute capability {capability()}"
            )
        return self._flash.refusal(device=device, dtype=dtype, head_dim=head_dim, softcap=softcap)

    def prepare(
        self, tiles: np.ndarray, device: torch.device, blocks: BlockTiles | None = None
    ) -> PreparedCudnn:
        """The calls of a tile table and of known block matrices, cuDNN's and the flash kernel's."""
        bands = np.concatenate([tiles, block_bands(blocks)])
        dense = dense_tiles(bands)
        rest = self._flash.prepare(bands[~dense], device, routed_tiles(blocks))
        return PreparedCudnn(build_calls(bands[dense], _cells), rest)

    @torch.no_grad()
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: PreparedCudnn,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.forward`."""
        options = {"scale": scale, "softcap": softcap, "selection": selection}
        self._flash.forward(q, k, v, prepared.rest, out, lse, **options)
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        for call in prepared.calls if q.shape[0] else ():
            for heads, key_heads in head_parts(call.h0, call.h1, q.shape[2] // k.shape[2]):
                for batch in batch_rows(call, q.shape[0]):
                    part_out, part_lse = self._op.forward(
                        query_blocks(q, batch, call, heads),
                        key_blocks(k, batch, call, key_heads),
                        key_blocks(v, batch, call, key_heads),
                        call.causal,
                        scale,
                    )
                    into_out = query_blocks(out, batch, call, heads)
                    into_lse = query_blocks(lse, batch, call, heads)
                    merge_partial(into_out, into_lse, part_out.to(out.dtype), part_lse)

    @torch.no_grad()
    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        prepared: PreparedCudnn,
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
        rest = prepared.rest
        self._flash.backward(dout, q, k, v, lse, delta, rest, dq, dk, dv, **options)
        if not prepared.calls or not q.shape[0]:
            return
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        dout, out = device_stand_in(dout, delta)
        for call in prepared.calls:
            for heads, key_heads in head_parts(call.h0, call.h1, q.shape[2] // k.shape[2]):
                for batch in batch_rows(call, q.shape[0]):
                    part_dq, part_dk, part_dv = self._op.backward(
                        query_blocks(dout, batch, call, heads),
                        query_blocks(q, batch, call, heads),
                        key_blocks(k, batch, call, key_heads),
                        key_blocks(v, batch, call, key_heads),
                        query_blocks(out, batch, call, heads),
                        query_blocks(lse, batch, call, heads),
                        call.causal,
                        scale,
                    )
                    query_blocks(dq, batch, call, heads).add_(part_dq)
                    add_to_keys(dk, part_dk, batch, call, key_heads)
                    add_to_keys(dv, part_dv, batch, call, key_heads)


def dense_tiles(tiles: np.ndarray) -> np.ndarray:
    """bool per row of a `TILE` table: whether cuDNN computes it, and not the flash kernel."""
    dense = (is_dense(one[0], SMALLEST) if one else True for one in map(_one, tiles))
    return np.fromiter(dense, dtype=bool, count=len(tiles))


def _one(row: np.void) -> tuple[LatticeTile, ...]:
    return lattice_tiles(np.array([row], dtype=row.dtype))


def _cells(tile: LatticeTile) -> tuple[Cell, ...]:
    """The dense cells of a tile as given: `build_calls` counts from the tile's own first row."""
    close = tight(tile)
    a, b = (close.q0 - tile.q0) // tile.step, (close.k0 - tile.k0) // tile.step
    cells = dense_cells(close) or ()
    return tuple(Cell(c.q0 + a, c.rows, c.k0 + b, c.keys, causal=c.causal) for c in cells)

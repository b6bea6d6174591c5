"""Local attention over FlexAttention, compiled: any tile list, as a masked product by blocks.

Each mask of `flex_tables` is one launch. Partial outputs come in the inputs' dtype and are merged
in float32; gradients likewise. Blocks selected at run time are the matmul kernel's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._triton import has_triton

from ringattn.kernels.block_bands import block_bands, routed_tiles
from ringattn.kernels.block_matrix import BlockTiles, Selection
from ringattn.kernels.cpu_views import unit_stride
from ringattn.kernels.flex_mask import FlexMask, device_mask
from ringattn.kernels.flex_op import CompiledFlex, FlexOp, Problem
from ringattn.kernels.flex_tables import FlexTables, flex_tables
from ringattn.kernels.gpu_limits import capability
from ringattn.kernels.heads import head_parts
from ringattn.kernels.matmul import MatmulKernel, PreparedTiles
from ringattn.kernels.merge import merge_partial

Rows = slice | torch.Tensor
SMALLEST_DIM, LARGEST_DIM = 16, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_block_kernel = MatmulKernel()


class _Launch(NamedTuple):
    h0: int
    h1: int
    rows: Rows
    keys: Rows
    mask: FlexMask


@dataclass(frozen=True)
class PreparedFlex:
    """Masks on the device with the rows and keys that they use, and tiles of run-time blocks."""

    launches: tuple[_Launch, ...]
    blocks: PreparedTiles


class FlexKernel:
    """See the module docstring. Implements `ringattn.kernels.base.Kernel`.

    Args:
        op: the op; compiled FlexAttention by default.
    """

    name = "flex"
    reads_around = False

    def __init__(self, op: FlexOp | None = None) -> None:
        self._op = op or CompiledFlex()

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Needs CUDA from 8.0 on with Triton, 16 bits or float32, head dims from 16 to 256."""
        if device != "cuda":
            return f"device {device} is not a CUDA GPU; FlexAttention has no backward elsewhere"
        if not torch.cuda.is_available():
            return f"device {device} is not there: this PyTorch sees no CUDA GPU"
        if not has_triton():
            return "Triton, which compiles FlexAttention, is not installed"
        if capability() < (8, 0):
            return f"compute capability {capability()} is below (8, 0)"
        if dtype not in DTYPES:
            return f"dtype {dtype} is none of float32, bfloat16, float16"
        if not all(SMALLEST_DIM <= dim <= LARGEST_DIM for dim in head_dim):
            return f"head dims {head_dim} are not between {SMALLEST_DIM} and {LARGEST_DIM}"
        return None

    def prepare(
        self, tiles: np.ndarray, device: torch.device, blocks: BlockTiles | None = None
    ) -> PreparedFlex:
        """The masks of a tile table and of known matrices; graphs are compiled at first use."""
        bands = np.concatenate([tiles, block_bands(blocks)])
        launches = tuple(self._launch(tables, device) for tables in flex_tables(bands))
        return PreparedFlex(
            launches, _block_kernel.prepare(tiles[:0], device, routed_tiles(blocks))
        )

    def _launch(self, t: FlexTables, device: torch.device) -> _Launch:
        mask = device_mask(t, device, dense=self._op.dense)
        return _Launch(t.h0, t.h1, _rows(t.rows, device), _rows(t.keys, device), mask)

    @torch.no_grad()
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: PreparedFlex,
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
        problem = Problem(scale, softcap or None)
        for x, heads, key_heads in _launches(prepared, q, k):
            part_out, part_lse = self._op.forward(
                x.mask,
                problem,
                _take(q, x.rows, heads),
                _take(k, x.keys, key_heads),
                _take(v, x.keys, key_heads),
            )
            into_out, into_lse = _take(out, x.rows, heads), _take(lse, x.rows, heads)
            merge_partial(into_out, into_lse, part_out.to(out.dtype), part_lse.to(lse.dtype))
            if isinstance(x.rows, torch.Tensor):  # these were copies
                out[:, x.rows, heads] = into_out.transpose(1, 2)
                lse[:, x.rows, heads] = into_lse.transpose(1, 2)

    @torch.no_grad()
    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        prepared: PreparedFlex,
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
        q, k, v, dout = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(dout)
        problem = Problem(scale, softcap or None)
        for x, heads, key_heads in _launches(prepared, q, k):
            part_dq, part_dk, part_dv = self._op.backward(
                x.mask,
                problem,
                _take(dout, x.rows, heads),
                _take(q, x.rows, heads),
                _take(k, x.keys, key_heads),
                _take(v, x.keys, key_heads),
                _take(lse, x.rows, heads).contiguous(),
                _take(delta, x.rows, heads).contiguous(),
            )
            _add(dq, x.rows, heads, part_dq)
            _add(dk, x.keys, key_heads, part_dk)
            _add(dv, x.keys, key_heads, part_dv)


def _rows(used: np.ndarray, device: torch.device) -> Rows:
    """Buffer rows as a slice where they are without gaps, else as an index."""
    if used[-1] - used[0] == len(used) - 1:
        return slice(int(used[0]), int(used[-1]) + 1)
    return torch.from_numpy(used).to(device)


def _launches(
    prepared: PreparedFlex, q: torch.Tensor, k: torch.Tensor
) -> Iterator[tuple[_Launch, slice, slice]]:
    for launch in prepared.launches if q.shape[0] else ():
        for heads, key_heads in head_parts(launch.h0, launch.h1, q.shape[2] // k.shape[2]):
            yield launch, heads, key_heads


def _take(x: torch.Tensor, rows: Rows, heads: slice) -> torch.Tensor:
    """(B, T, H[, D]) → (B, H, rows[, D]): a view, or a copy where rows are an index."""
    return x[:, rows, heads].transpose(1, 2)


def _add(into: torch.Tensor, rows: Rows, heads: slice, part: torch.Tensor) -> None:
    part = part.transpose(1, 2)
    if isinstance(rows, slice):
        into[:, rows, heads].add_(part)
    else:
        into[:, :, heads].index_add_(1, rows, part.to(into.dtype))

"""Our band kernel in Triton: any tile list in one launch per step, forward and backward.

Masks by bands and by known block matrices become one table of tiles (`block_bands`); blocks chosen
at run time become lists made on the device (`routed_lists`). See `triton_forward` and
`triton_backward` for what runs on the device, `work_items` for how rows are cut.
"""

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import numpy as np
import torch

from ringattn.errors import UserError
from ringattn.kernels.block_bands import block_bands, routed_tiles
from ringattn.kernels.block_matrix import BlockTiles, Selection
from ringattn.kernels.cpu_views import unit_stride
from ringattn.kernels.gpu_limits import capability
from ringattn.kernels.measured import architecture_of
from ringattn.kernels.merge import NO_KEY
from ringattn.kernels.routed_lists import routed_work
from ringattn.kernels.triton_configs import BlockConfig, Part, block_config
from ringattn.kernels.triton_launch import interpreted, launch
from ringattn.kernels.triton_tiles import Configs, TritonTiles
from ringattn.kernels.work_lists import WorkList

OLDEST = (8, 0)
MOST_DIM = {2: 256, 4: 128}
"""By bytes of an element. Wider float32 rows do not fit into registers as three tf32 products."""

MARGIN = 256
"""Rows of statistics beyond the last one: as many as a block has at most."""

FEW_PROGRAMS = 2
"""With fewer programs per multiprocessor, query heads of a group become programs of their own."""


class TritonBandKernel:
    """See the module docstring. Implements `ringattn.kernels.base.Kernel`.

    Args:
        configs: block sizes by kernel; the shipped table's where None.
        deterministic: whether gradients repeat bit by bit; where None, as
            `torch.are_deterministic_algorithms_enabled()` says at each backward.
    """

    name = "triton"
    reads_around = True

    def __init__(
        self, configs: Mapping[Part, BlockConfig] | None = None, deterministic: bool | None = None
    ) -> None:
        self._configs, self._deterministic = configs, deterministic

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Needs triton, CUDA (or Triton's interpreter), 16- or 32-bit floats, dims up to 256."""
        del softcap
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {dtype} is none of float32, bfloat16, float16"
        most = MOST_DIM[dtype.itemsize]
        if not 1 <= min(head_dim) <= max(head_dim) <= most:
            return f"head dims {head_dim} are not between 1 and {most}, its limit in {dtype}"
        if find_spec("triton") is None:
            return "triton is not installed"
        if device != "cuda" and not (device == "cpu" and interpreted()):
            return f"device {device} is not a CUDA GPU"
        if device == "cuda" and torch.cuda.is_available() and capability() < OLDEST:
            return f"compute capability {capability()} is below {OLDEST}"
        return None

    def prepare(
        self, tiles: np.ndarray, device: torch.device, blocks: BlockTiles | None = None
    ) -> TritonTiles:
        """Bands and known blocks in one table; work lists are made at the first launch."""
        bands = np.concatenate([tiles, block_bands(blocks)])
        bands = bands[(bands["q0"] < bands["q1"]) & (bands["k0"] < bands["k1"])]
        return TritonTiles(bands[bands["h0"] < bands["h1"]], routed_tiles(blocks), device)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: TritonTiles,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.forward`."""
        _check_scale(scale)
        # The maximum is taken of products that are not scaled yet, so their scale is positive.
        q, k, v, scale = (*(unit_stride(x) for x in (-q if scale < 0 else q, k, v)), abs(scale))
        configs, group = self._both("forward", q, v, softcap), q.shape[2] // k.shape[2]
        for work in self._query_lists(prepared, configs, group, selection):
            launch("forward", work, (q, k, v, out, lse), group, scale, softcap)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        prepared: TritonTiles,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """See `Kernel.backward`."""
        _check_scale(scale)
        dout, q, k, v = (unit_stride(x) for x in (dout, q, k, v))
        stats = statistics(lse, delta)
        group, few = q.shape[2] // k.shape[2], FEW_PROGRAMS * processors(q.device)
        few //= max(1, q.shape[0])
        repeatable = self.deterministic
        part: Part = "keys_only" if repeatable else "keys"
        configs, operands = self._both(part, q, v, softcap), (q, k, v, dout, stats, dq, dk, dv)
        for work, shared in self._key_lists(prepared, configs, group, few, selection):
            launch(part, work, operands, group, scale, softcap, shared=shared)
        if not repeatable:
            return
        configs = self._both("queries", q, v, softcap)
        for work in self._query_lists(prepared, configs, group, selection):
            launch("queries", work, (q, k, v, dout, stats, dq), group, scale, softcap)

    @property
    def deterministic(self) -> bool:
        """Whether gradients repeat bit by bit."""
        if self._deterministic is not None:
            return self._deterministic
        return torch.are_deterministic_algorithms_enabled()

    def _both(self, part: Part, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> Configs:
        """Block sizes for columns in runs, and listed."""
        if self._configs is not None:
            return self._configs[part], self._configs[part]
        arch, dim = architecture_of(q.device), max(q.shape[3], v.shape[3])
        runs, listed = (
            block_config(arch, part, dim, q.element_size(), softcap=bool(softcap), listed=listed)
            for listed in (False, True)
        )
        return runs, listed

    def _query_lists(
        self,
        prepared: TritonTiles,
        configs: Configs,
        group: int,
        selection: Selection | None,
    ) -> Iterator[WorkList]:
        if len(prepared.bands):
            yield from prepared.queries(configs)
        for routed in prepared.routed_items(configs[1].rows, by_queries=True):
            assert selection is not None, "a plan of run-time blocks runs with a selection"
            made = routed_work(routed, selection, configs[1], group, deterministic=True)
            yield from (work for work, _ in made)

    def _key_lists(
        self,
        prepared: TritonTiles,
        configs: Configs,
        group: int,
        few: int,
        selection: Selection | None,
    ) -> Iterator[tuple[WorkList, bool]]:
        if len(prepared.bands):
            yield from prepared.keys(configs, group, few, self.deterministic)
        for routed in prepared.routed_items(configs[1].rows, by_queries=False):
            assert selection is not None, "a plan of run-time blocks runs with a selection"
            yield from routed_work(
                routed, selection, configs[1], group, deterministic=self.deterministic
            )


def _check_scale(scale: float) -> None:
    if scale == 0 or not math.isfinite(scale):
        raise UserError(
            f"scale={scale}", "kernel=triton needs a finite one other than 0", "use kernel=matmul"
        )


def statistics(lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """float32 (B, Hq, 2, T + MARGIN): lse in base 2, +inf for rows without keys, and delta.

    Strides are multiples of 16 whatever T is, so that one compiled kernel takes every length.
    """
    batch, rows, heads = lse.shape
    stats = lse.new_zeros((batch, heads, 2, -(-rows // 16) * 16 + MARGIN), dtype=torch.float32)
    base_2 = (lse * math.log2(math.e)).masked_fill_(lse == NO_KEY, torch.inf)
    stats[:, :, 0, :rows] = base_2.transpose(1, 2)
    stats[:, :, 1, :rows] = delta.transpose(1, 2)
    return stats


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count

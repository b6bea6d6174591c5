"""Our band kernel in Triton: any tile list in one launch per step, forward and backward.

Masks by bands and by known block matrices become one table of tiles (`block_bands`); blocks chosen
at run time become lists made on the device (`routed_lists`). See `triton_forward` and
`triton_backward` for what runs on the device, `work_items` for how rows are cut.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from ringattn.kernels.block_bands import block_bands, routed_tiles
from ringattn.kernels.block_matrix import BlockTiles, Selection
from ringattn.kernels.merge import NO_KEY
from ringattn.kernels.routed_lists import RoutedItems, routed_items, routed_work
from ringattn.kernels.triton_configs import BlockConfig, Part, block_config
from ringattn.kernels.work_items import build_items, head_segments, transposed
from ringattn.kernels.work_lists import (
    WorkList,
    head_groups,
    ordered_works,
    single_heads,
    work_list,
)

MOST_DIM = 256
FEW_PROGRAMS = 2
"""With fewer programs per multiprocessor, query heads of a group become programs of their own."""


@dataclass(frozen=True, eq=False)
class TritonTiles:
    """A tile list, and its work lists by block sizes, made when they are first asked for."""

    bands: np.ndarray
    routed: BlockTiles | None
    device: torch.device
    lists: dict[Any, Any] = field(default_factory=dict)

    def queries(self, config: BlockConfig) -> list[WorkList]:
        """Work lists over query rows."""
        key = ("queries", config.rows, config.columns)
        if key not in self.lists:
            self.lists[key] = [
                work_list(items, ordered_works(items, single_heads), config.columns, self.device)
                for items in build_items(self.bands, config.rows, config.columns)
            ]
        return self.lists[key]

    def routed_items(self, rows: int, *, by_queries: bool) -> list[RoutedItems]:
        """The items of run-time blocks."""
        if self.routed is None:
            return []
        key = ("routed", rows, by_queries)
        if key not in self.lists:
            self.lists[key] = routed_items(self.routed, rows, by_queries=by_queries)
        return self.lists[key]

    def keys(
        self, config: BlockConfig, group: int, few: int, deterministic: bool
    ) -> list[tuple[WorkList, bool]]:
        """Work lists over key rows, and whether their programs share rows of dk and dv.

        Below `few` programs, every query head is one of its own. A deterministic list shares none:
        where heads of one group have unequal tiles, they take their turns.
        """
        key = ("keys", config.rows, config.columns, group, few, deterministic)
        if key not in self.lists:
            self.lists[key] = self._keys(config, group, few, deterministic)
        return self.lists[key]

    def _keys(
        self, config: BlockConfig, group: int, few: int, deterministic: bool
    ) -> list[tuple[WorkList, bool]]:
        tiles = transposed(self.bands)
        apart = bool(((tiles["h0"] % group) | (tiles["h1"] % group)).any())
        tables = list(head_segments(tiles)) if apart and deterministic else [tiles]
        result = []
        for table in tables:
            for items in build_items(table, config.rows, config.columns):
                works = ordered_works(items, head_groups(group))
                split = group > 1 and len(works) < few and not deterministic
                if split:
                    works = ordered_works(items, single_heads)
                made = work_list(items, works, config.columns, self.device)
                result.append((made, split or (apart and not deterministic)))
        return result


class TritonBandKernel:
    """See the module docstring. Implements `ringattn.kernels.base.Kernel`.

    Args:
        configs: block sizes by kernel; the shipped table's where None.
        deterministic: whether gradients repeat bit by bit; where None, as
            `torch.are_deterministic_algorithms_enabled()` says at each backward.
    """

    name = "triton"

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
        if not 1 <= min(head_dim) <= max(head_dim) <= MOST_DIM:
            return f"head dims {head_dim} are not between 1 and {MOST_DIM}"
        if find_spec("triton") is None:
            return "triton is not installed"
        if device != "cuda" and not (device == "cpu" and _interpreted()):
            return f"device {device} is not a CUDA device"
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
        from ringattn.kernels.triton_forward import band_forward

        q, k, v = (_unit_stride(x) for x in (q, k, v))
        config, group = self._config("forward", q, v), q.shape[2] // k.shape[2]
        for work in self._query_lists(prepared, config, group, selection):
            launch(
                band_forward,
                work,
                config,
                (q, k, v, out, lse),
                (*_strides(q, k, v, out, lse), work.range_batch, group),
                (scale, softcap),
                head_dim=(q.shape[3], v.shape[3]),
            )

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
        from ringattn.kernels.triton_backward import band_backward_keys, band_backward_queries

        dout, q, k, v = (_unit_stride(x) for x in (dout, q, k, v))
        stats = _statistics(lse, delta)
        group, few = q.shape[2] // k.shape[2], FEW_PROGRAMS * _processors(q.device) // q.shape[0]
        config = self._config("keys", q, v)
        strides = (*_strides(q, k, v, dout), *stats.stride()[:3])
        for work, shared in self._key_lists(prepared, config, group, few, selection):
            launch(
                band_backward_keys,
                work,
                config,
                (q, k, v, dout, stats, dq, dk, dv),
                (*strides, *_strides(dq, dk, dv), work.range_batch, group),
                (scale, softcap),
                head_dim=(q.shape[3], v.shape[3]),
                ADD_DQ=not self.deterministic,
                SHARED=shared,
            )
        if not self.deterministic:
            return
        config = self._config("queries", q, v)
        for work in self._query_lists(prepared, config, group, selection):
            launch(
                band_backward_queries,
                work,
                config,
                (q, k, v, dout, stats, dq),
                (*strides, *_strides(dq), work.range_batch, group),
                (scale, softcap),
                head_dim=(q.shape[3], v.shape[3]),
            )

    @property
    def deterministic(self) -> bool:
        """Whether gradients repeat bit by bit."""
        if self._deterministic is not None:
            return self._deterministic
        return torch.are_deterministic_algorithms_enabled()

    def _config(self, part: Part, q: torch.Tensor, v: torch.Tensor) -> BlockConfig:
        if self._configs is not None:
            return self._configs[part]
        dim = max(q.shape[3], v.shape[3])
        return block_config(_architecture(q.device), part, dim, q.element_size())

    def _query_lists(
        self,
        prepared: TritonTiles,
        config: BlockConfig,
        group: int,
        selection: Selection | None,
    ) -> Iterator[WorkList]:
        if len(prepared.bands):
            yield from prepared.queries(config)
        for routed in prepared.routed_items(config.rows, by_queries=True):
            assert selection is not None, "a plan of run-time blocks runs with a selection"
            made = routed_work(routed, selection, config.columns, group, deterministic=True)
            yield from (work for work, _ in made)

    def _key_lists(
        self,
        prepared: TritonTiles,
        config: BlockConfig,
        group: int,
        few: int,
        selection: Selection | None,
    ) -> Iterator[tuple[WorkList, bool]]:
        if len(prepared.bands):
            yield from prepared.keys(config, group, few, self.deterministic)
        for routed in prepared.routed_items(config.rows, by_queries=False):
            assert selection is not None, "a plan of run-time blocks runs with a selection"
            yield from routed_work(
                routed, selection, config.columns, group, deterministic=self.deterministic
            )


def launch(
    function: Any,
    work: WorkList,
    config: BlockConfig,
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    options: tuple[float, float | None],
    head_dim: tuple[int, int],
    **constants: bool,
) -> None:
    """Starts one of the kernels over a work list."""
    import triton
    from triton import language as tl

    scale, softcap = options
    reach = config.rows * work.step * max(t.stride(1) for t in tensors)
    reach = max(reach, config.columns * work.step * max(t.stride(1) for t in tensors))
    device = tensors[0].device
    tables = (work.works, work.items, work.refs, work.ranges, work.entries)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        function[len(work.works), tensors[0].shape[0]](
            *tensors,
            *tables,
            *numbers,
            scale,
            softcap or 1.0,
            STEP=work.step,
            D=head_dim[0],
            E=head_dim[1],
            BD=max(16, triton.next_power_of_2(head_dim[0])),
            BE=max(16, triton.next_power_of_2(head_dim[1])),
            ROWS=config.rows,
            COLUMNS=config.columns,
            LISTED=work.listed,
            SOFTCAP=bool(softcap),
            PRECISION="tf32x3" if tensors[0].dtype == torch.float32 else "tf32",
            OFFSET=tl.int64 if reach >= 1 << 31 else tl.int32,
            num_warps=config.warps,
            num_stages=config.stages,
            **constants,
        )


def _statistics(lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """float32 (2, B, Hq, T): lse in base 2, +inf for rows without keys, and delta."""
    batch, rows, heads = lse.shape
    stats = torch.empty((2, batch, heads, rows), dtype=torch.float32, device=lse.device)
    stats[0] = (lse * math.log2(math.e)).masked_fill_(lse == NO_KEY, torch.inf).transpose(1, 2)
    stats[1] = delta.transpose(1, 2)
    return stats


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(x for t in tensors for x in t.stride()[:3])


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _interpreted() -> bool:
    from ringattn.kernels.triton_forward import band_forward

    return type(band_forward).__name__ == "InterpretedFunction"


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count

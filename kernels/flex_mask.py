"""FlexAttention masks on the device: block lists and the test of a pair in a partial block."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from ringattn.kernels.flex_tables import BLOCK, FlexTables

Tensors = tuple[torch.Tensor, ...]
Test = Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class FlexMask:
    """A mask on the device.

    Attributes:
        block_mask: what `BlockMask.as_tuple` gives, its test reading `buffers`.
        buffers: tables of start, stop and, where some step is not 1, step; flat. A dense mask has
            those of full and partial blocks as well.
        graphs: compiled graphs of this mask, by direction, problem and operands.
    """

    block_mask: tuple[Any, ...]
    buffers: Tensors
    graphs: dict[Any, Callable[..., Tensors]] = field(default_factory=dict, repr=False)

    @property
    def tensors(self) -> Tensors:
        """All tensors of the mask, for a graph to take as inputs."""
        return (*self.buffers, *(x for x in self.block_mask if isinstance(x, torch.Tensor)))

    def arguments(self, tensors: Tensors) -> tuple[tuple[Any, ...], Tensors]:
        """(block mask, buffers) made of other tensors in the place of `tensors`."""
        blocks = iter(tensors[len(self.buffers) :])
        block_mask = (next(blocks) if isinstance(x, torch.Tensor) else x for x in self.block_mask)
        return tuple(block_mask), tensors[: len(self.buffers)]


def device_mask(tables: FlexTables, device: torch.device, *, dense: bool = False) -> FlexMask:
    """The mask on a device.

    Args:
        tables: what is allowed.
        device: where the tensors go.
        dense: the test holds outside partial blocks too, for an op that does not look at blocks.
    """
    slots, rows = tables.start.shape
    test = _slot_test(slots, rows)
    held = [tables.start, tables.stop]
    if tables.step is not None:
        held.append(tables.step)
    if dense:
        test = _dense_test(test, tables.full.shape[1])
        held += [tables.full, tables.partial]
    (count, index), (full_count, full_index) = (
        _ordered(blocks, device) for blocks in (tables.partial, tables.full)
    )
    block_mask = BlockMask.from_kv_blocks(
        count,
        index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=test,
        seq_lengths=(len(tables.rows), len(tables.keys)),
    )
    buffers = tuple(torch.from_numpy(x).to(device).flatten() for x in held)
    return FlexMask(block_mask.as_tuple(), buffers)


def _slot_test(slots: int, rows: int) -> Test:
    """Whether any interval of a row has a key.

    Tables are flat: indexing with a constant would put that constant into the graph as a tensor.
    """

    def test(
        b: Any, h: Any, row: torch.Tensor, key: torch.Tensor, *tables: torch.Tensor
    ) -> torch.Tensor:
        start, stop, *step = tables
        allowed = row < 0
        for slot in range(slots):
            at = row + slot * rows
            inside = (key >= start[at]) & (key < stop[at])
            for every in step:
                inside = inside & ((key - start[at]) % every[at] == 0)
            allowed = allowed | inside
        return allowed

    return test


def _dense_test(partial_test: Test, k_blocks: int) -> Test:
    """The same, with everything in full blocks and nothing outside partial ones."""

    def test(
        b: Any, h: Any, row: torch.Tensor, key: torch.Tensor, *tables: torch.Tensor
    ) -> torch.Tensor:
        *intervals, full, partial = tables
        block = row // BLOCK * k_blocks + key // BLOCK
        return full[block] | (partial[block] & partial_test(b, h, row, key, *intervals))

    return test


def _ordered(blocks: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, index) of the true entries of each row, (1, 1, rows) and (1, 1, rows, columns)."""
    dense = torch.from_numpy(blocks).to(device)[None, None]
    index = dense.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), index.to(torch.int32)

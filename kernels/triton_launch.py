"""Starting the band kernel's programs: operands, descriptors, constants."""

from contextlib import nullcontext
from typing import Any

import torch

from ringattn.kernels.triton_configs import BlockConfig, Part
from ringattn.kernels.work_lists import WorkList

OPERAND_BLOCKS: dict[Part, tuple[str, ...]] = {
    "forward": ("", "columns", "columns", "", ""),
    "keys": ("columns", "", "", "columns", "stats", "added", "", ""),
    "keys_only": ("columns", "", "", "columns", "stats", "", "", ""),
    "queries": ("", "columns", "columns", "", "stats", ""),
}
"""By operand: read or added to in blocks of columns, by TMA where wanted; others by pointers."""

DESCRIBED = ("columns", "added")

TMA_BYTES = 16
"""What addresses and strides are multiples of, for TMA (CUDA driver API, tensor maps)."""


def launch(
    part: Part,
    work: WorkList,
    operands: tuple[torch.Tensor, ...],
    group: int,
    scale: float,
    softcap: float | None,
    *,
    shared: bool = False,
) -> None:
    """Starts a kernel over a work list; `operands` in the kernel's order.

    shared: several programs add to the same rows of dk and dv.
    """
    q = operands[0]
    arguments, constants = call(part, work, operands, group, scale, softcap, shared=shared)
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        kernel(part)[len(work.works), q.shape[0]](*arguments, **constants)


def call(
    part: Part,
    work: WorkList,
    operands: tuple[torch.Tensor, ...],
    group: int,
    scale: float,
    softcap: float | None,
    *,
    shared: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `launch` passes to the kernel: (arguments, constants and options)."""
    from triton import language as tl

    config, q, v = work.config, operands[0], operands[2]
    blocks = OPERAND_BLOCKS[part]
    rows = max(config.rows, config.columns)
    pairs = zip(operands, blocks, strict=True)
    reach = max(rows * work.step * t.stride(1) for t, block in pairs if block != "stats")
    tma = config.tma and work.step == 1 and all(map(_describable, operands, blocks))
    constants = {
        "STEP": work.step,
        "D": q.shape[3],
        "E": v.shape[3],
        "BD": padded(q.shape[3]),
        "BE": padded(v.shape[3]),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "LISTED": work.listed,
        "SOFTCAP": bool(softcap),
        "PRECISION": "upcast" if interpreted() else precision(q.element_size()),
        "OFFSET": tl.int64 if reach >= 1 << 31 else tl.int32,
        "TMA": tma,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if part in ("keys", "keys_only"):
        added = part == "keys"
        constants |= {"ADD_DQ": added, "SHARED": shared, "REDUCE": added and tma and _reduces()}
    arguments = (
        *(_operand(t, b, config, tma) for t, b in zip(operands, blocks, strict=True)),
        tuple(map(_strides, operands)),
        *(work.works, work.items, work.refs, work.ranges, work.entries),
        *(work.range_batch, group, scale, softcap or 1.0),
    )
    return arguments, constants


def kernel(part: Part) -> Any:
    """The Triton function of a part. Imports triton."""
    from ringattn.kernels import triton_backward, triton_forward

    return {
        "forward": triton_forward.band_forward,
        "keys": triton_backward.band_backward_keys,
        "keys_only": triton_backward.band_backward_keys,
        "queries": triton_backward.band_backward_queries,
    }[part]


def padded(dim: int) -> int:
    """The block size that holds a head dim: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def precision(itemsize: int) -> str:
    """How products are taken: float32 as three products of tf32 parts, near float32's accuracy."""
    return "tf32x3" if itemsize == 4 else "tf32"


def interpreted() -> bool:
    """Whether triton interprets its kernels, on tensors of the CPU."""
    return type(kernel("forward")).__name__ == "InterpretedFunction"


def _reduces() -> bool:
    """Whether blocks are added through descriptors, which the interpreter does not know."""
    return not interpreted()


def _operand(tensor: torch.Tensor, block: str, config: BlockConfig, tma: bool) -> Any:
    if not tma or block not in DESCRIBED or (block == "added" and not _reduces()):
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape = [1, config.columns, 1, padded(tensor.shape[3])]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), shape)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of all dims but the last; 0 where there is one element.

    Those are never used, but triton compiles anew where a stride becomes 1 or loses its factor 16.
    """
    dims = zip(tensor.shape[:3], tensor.stride(), strict=False)
    return tuple(stride if size > 1 else 0 for size, stride in dims)


def _describable(tensor: torch.Tensor, block: str) -> bool:
    """Whether TMA takes it; not where a dim repeats one place, as in an expanded gradient."""
    if block not in DESCRIBED:
        return True
    dims = zip(tensor.shape[:3], tensor.stride(), strict=False)
    if any(size > 1 and stride == 0 for size, stride in dims):
        return False
    strides = [n * tensor.element_size() for n in tensor.stride()[:3]]
    return tensor.data_ptr() % TMA_BYTES == 0 and not any(n % TMA_BYTES for n in strides)

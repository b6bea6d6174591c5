"""Writing a whole tensor's values into the part of it that a rank holds."""

from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor


def write_part(tensor: torch.Tensor, read: Callable[[tuple[slice, ...]], torch.Tensor]) -> None:
    """Fills a tensor in place; of a `DTensor` this rank's shard. No communication.

    Args:
        tensor: plain, or a `DTensor` of any even or uneven sharding.
        read: gives the values at slices of the whole tensor, one slice per dimension, in any dtype
            and on any device; called at most once, with no more than what is held here.
    """
    local, index = tensor, tuple(slice(0, size) for size in tensor.shape)
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        (chunk,) = tensor.__create_chunk_list__()
        index = tuple(
            slice(start, start + size)
            for start, size in zip(chunk.offsets, local.shape, strict=True)
        )
    if local.numel():
        with torch.no_grad():
            local.copy_(read(index))

"""Moving whole tensors to and from shards."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ringattn.layout import Layout


def take_shard(x: torch.Tensor, layout: Layout, rank: int, dim: int) -> torch.Tensor:
    """The rows of a rank; ranges are sliced, never gathered. May share memory with `x`."""
    dim = dim % x.dim()
    mine = layout.ranges[layout.ranges["owner"] == rank]
    index = [slice(None)] * x.dim()
    parts = []
    for r in mine:
        index[dim] = slice(int(r["start"]), int(r["stop"]), int(r["step"]))
        parts.append(x[tuple(index)])
    if not parts:
        index[dim] = slice(0, 0)
        parts.append(x[tuple(index)])
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def join_shards(shards: list[torch.Tensor], layout: Layout, dim: int) -> torch.Tensor:
    """The whole tensor from every rank's rows."""
    order = torch.from_numpy(np.argsort(layout.order(), kind="stable"))
    whole = torch.cat(shards, dim)
    return whole.index_select(dim, order.to(whole.device))


class Unshard(torch.autograd.Function):
    """Gathers shards to the whole tensor on every rank; backward takes this rank's rows.

    The backward is right where every rank computes the same from the whole tensor (a replicated
    loss), as for `DTensor.full_tensor`. All ranks of the group communicate in the forward only.
    """

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, layout: Layout, group: dist.ProcessGroup | None, dim: int
    ) -> torch.Tensor:
        ctx.layout, ctx.dim = layout, dim % local.dim()
        ctx.rank = dist.get_rank(group) if group is not None else 0
        if group is None:
            return join_shards([local], layout, ctx.dim)
        rows = int(layout.sizes.max())
        shape = list(local.shape)
        shape[ctx.dim] = rows
        padded = local.new_zeros(shape)
        padded.narrow(ctx.dim, 0, local.shape[ctx.dim]).copy_(local)
        parts = [torch.empty_like(padded) for _ in range(layout.world)]
        dist.all_gather(parts, padded, group=group)
        shards = [p.narrow(ctx.dim, 0, int(n)) for p, n in zip(parts, layout.sizes, strict=True)]
        return join_shards(shards, layout, ctx.dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return take_shard(grads[0], ctx.layout, ctx.rank, ctx.dim), None, None, None

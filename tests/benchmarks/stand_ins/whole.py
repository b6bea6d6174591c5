"""What the stand-ins of peers compute with: every rank gathers all shards and attends densely."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Allowed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Gather(torch.autograd.Function):
    """(P, *x.shape) of every rank's x; the gradient is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def _gathered(x: torch.Tensor) -> torch.Tensor:
    parts = _Gather.apply(x)
    assert isinstance(parts, torch.Tensor)
    return torch.cat(list(parts), 1)


def attend_whole(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: list[torch.Tensor],
    allowed: Allowed,
) -> torch.Tensor:
    """Local out (1, T, H, D) of local q, k, v; tokens[r] are those of rank r, -1 for padding.

    `allowed` says which of (queries, 1) may attend which of (1, keys) global tokens.
    """
    k, v = (_gathered(x) for x in (k, v))
    keys = torch.cat(tokens)
    mine = tokens[dist.get_rank()]
    seen = allowed(mine[:, None], keys[None]) & (keys >= 0)[None] & (mine >= 0)[:, None]
    return dense(q, k, v, seen)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """out (1, T, H, D) under a bool mask; rows that see nothing get 0."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    score = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    score = score.masked_fill(~allowed, -1e9)
    probability = torch.softmax(score, -1).masked_fill(~allowed, 0.0)
    return torch.einsum("bhij,bjhd->bihd", probability, v)


def causal_or_window(causal: bool, window: tuple[int, int]) -> Allowed:
    """flash-attn's two arguments on global tokens."""
    left, right = window[0], 0 if causal else window[1]

    def allowed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = torch.ones_like(k - q, dtype=torch.bool)
        if right >= 0:
            seen &= k - q <= right
        if left >= 0:
            seen &= q - k <= left
        return seen

    return allowed


def zigzag(seq_len: int, rank: int, world: int) -> torch.Tensor:
    """Chunks `rank` and 2P - 1 - `rank` of 2P."""
    chunks = torch.arange(seq_len).chunk(2 * world)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]])

"""Dense attention with flash-attn's conventions: what its kernels return, in PyTorch ops.

Sums are in float32. Tensors are (batch, tokens, heads, D); causal and windows are aligned at the bottom right; lse is
(batch, heads, tokens).
"""

import torch

Window = tuple[int, int]
OPEN: Window = (-1, -1)


def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, causal: bool, window: Window
) -> torch.Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    score = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * (scale or q.shape[-1] ** -0.5)
    rows, keys = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
    distance = keys - rows - (k.shape[1] - q.shape[1])
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if right >= 0:
        hidden |= distance > right
    if left >= 0:
        hidden |= distance < -left
    return score.masked_fill(hidden, -torch.inf)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    causal: bool = False,
    window: Window = OPEN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse. Differentiable."""
    score = _scores(q, k, scale, causal, window)
    lse = torch.logsumexp(score, -1)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    probability = torch.exp(score - lse[..., None])
    return torch.einsum("bhij,bjhd->bihd", probability, v.float()).to(q.dtype), lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
    causal: bool = False,
    window: Window = OPEN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of one block, by the lse and the output of the whole row."""
    factor, group = scale or q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    probability = torch.exp(_scores(q, k, scale, causal, window) - lse[..., None])
    dtype = q.dtype
    dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    wide_k, wide_v = (x.repeat_interleave(group, 2) for x in (k, v))
    dprobability = torch.einsum("bihd,bjhd->bhij", dout, wide_v)
    delta = torch.einsum("bihd,bihd->bhi", dout, out)
    dscore = probability * (dprobability - delta[..., None]) * factor
    dq = torch.einsum("bhij,bjhd->bihd", dscore, wide_k)
    dk = torch.einsum("bhij,bihd->bjhd", dscore, q)
    dv = torch.einsum("bhij,bihd->bjhd", probability, dout)
    dk, dv = (x.unflatten(2, (k.shape[2], group)).sum(3) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)

"""Dense softmax attention in float64: what every kernel and every plan is held against.

Shapes: q (B, S, Hq, D), k (B, S, Hkv, D), v (B, S, Hkv, E), out and dout (B, S, Hq, E).
Written with explicit products, one query head at a time, so that it shares no code path with the
kernels it judges.
"""

import math
from typing import NamedTuple

import torch


class DenseAttention(NamedTuple):
    """Result of `dense_attention`, all float64. Gradients are None without `dout`."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    dsinks: torch.Tensor | None


class _Head(NamedTuple):
    """One query head: probabilities (B, Sq, Sk), lse (B, Sq) and d(score)/d(scaled q.k)."""

    prob: torch.Tensor
    lse: torch.Tensor
    slope: torch.Tensor | None


def _head_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    allowed: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> _Head:
    score = q @ k.transpose(-1, -2) * scale
    slope = None
    if softcap:
        squashed = torch.tanh(score / softcap)
        score, slope = softcap * squashed, 1 - squashed.square()
    score = score.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(score, dim=-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.expand_as(lse))
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    return _Head(torch.exp(score - shift.unsqueeze(-1)), lse, slope)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    dout: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> DenseAttention:
    """Attention and, where `dout` is given, its gradients, in float64.

    Args:
        q, k, v: (B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, E), any floating dtype.
        allowed: bool, (Sq, Sk) or (Hq, Sq, Sk).
        dout: (B, Sq, Hq, E), gradient of the loss with respect to out.
        scale: multiplies q.k; 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: (Hq,) logits that join each row's softmax denominator and carry no value.

    Returns:
        out, lse (B, Sq, Hq; sink included), dq, dk, dv, dsinks. A row without any allowed key
        has out 0, lse -inf (the sink's logit where there is one) and zero gradients.
    """
    q, k, v = q.double(), k.double(), v.double()
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_zeros(q.shape[:3])
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    dsinks = None if sinks is None or dout is None else q.new_zeros(heads)
    for h in range(heads):
        kh, vh = k[:, :, h // group], v[:, :, h // group]
        mask = allowed[h] if allowed.dim() == 3 else allowed
        sink = None if sinks is None else sinks[h].double()
        head = _head_softmax(q[:, :, h], kh, mask, scale, softcap, sink)
        out[:, :, h], lse[:, :, h] = head.prob @ vh, head.lse
        if dout is None:
            continue
        do = dout[:, :, h].double()
        delta = (do * out[:, :, h]).sum(-1)
        dscore = head.prob * (do @ vh.transpose(-1, -2) - delta.unsqueeze(-1)) * scale
        if head.slope is not None:
            dscore = dscore * head.slope
        dq[:, :, h] = dscore @ kh
        dk[:, :, h // group] += dscore.transpose(-1, -2) @ q[:, :, h]
        dv[:, :, h // group] += head.prob.transpose(-1, -2) @ do
        if dsinks is not None and sink is not None:
            dsinks[h] = -(torch.exp(sink - head.lse) * delta).sum()
    if dout is None:
        return DenseAttention(out, lse, None, None, None, None)
    return DenseAttention(out, lse, dq, dk, dv, dsinks)

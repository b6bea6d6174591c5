"""The dense float64 reference on a mask."""

import torch

from ringattn.kernels.reference import DenseAttention, dense_attention
from ringattn.masks import Mask


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    dout: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> DenseAttention:
    """Attention and, with dout, its gradients in float64, from the dense mask; O(S^2) memory.

    Args:
        q, k, v, dout: whole tensors (B, S, heads, head dim), any float dtype.
        mask: over the same S.

    Returns:
        out, lse (B, S, Hq), dq, dk, dv, dsinks; gradients are None without dout.
    """
    allowed = torch.from_numpy(mask.dense()).to(q.device)
    return dense_attention(q, k, v, allowed, dout, scale=scale, softcap=softcap, sinks=sinks)

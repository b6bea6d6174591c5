"""The dense float64 reference on a mask."""

from functools import partial

import numpy as np
import torch

from ringattn.kernels.reference import DenseAttention, dense_attention
from ringattn.masks import Mask
from ringattn.routing import select_whole, selected_layers

_PER_BATCH = ("out", "lse", "dq", "dk", "dv")


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
        mask: over the same S. Where it is routed, blocks are selected from q and k as `attention`
            selects them, in the dtype that they have here.

    Raises:
        UserError: the mask's head groups do not make up the query heads.

    Returns:
        out, lse (B, S, Hq), dq, dk, dv, dsinks; gradients are None without dout.
    """
    attend = partial(dense_attention, scale=scale, softcap=softcap, sinks=sinks)
    if mask.routing is None or not q.shape[0]:
        allowed = torch.from_numpy(_layers(mask, q.shape[2])).to(q.device)
        return attend(q, k, v, allowed, dout)
    selection = select_whole(q, k, mask)
    parts = [
        attend(
            q[b : b + 1],
            k[b : b + 1],
            v[b : b + 1],
            selected_layers(mask, selection[b], q.shape[2]).to(q.device),
            None if dout is None else dout[b : b + 1],
        )
        for b in range(q.shape[0])
    ]
    return _stacked(parts)


def _stacked(parts: list[DenseAttention]) -> DenseAttention:
    """Results of single batch elements as one; gradients of sinks are summed."""

    out, lse, dq, dk, dv = (
        None if values[0] is None else torch.cat(values)
        for values in ([getattr(part, name) for part in parts] for name in _PER_BATCH)
    )
    dsinks = None
    if parts[0].dsinks is not None:
        dsinks = torch.stack([p.dsinks for p in parts if p.dsinks is not None]).sum(0)
    assert out is not None
    assert lse is not None
    return DenseAttention(out, lse, dq, dk, dv, dsinks)


def _layers(mask: Mask, q_heads: int) -> np.ndarray:
    """The dense mask, one layer per query head where heads differ."""
    counts, dense = mask.head_counts(q_heads), mask.dense()
    if dense.ndim == 2:
        return dense
    return dense if len(dense) == q_heads else np.repeat(dense, counts, axis=0)

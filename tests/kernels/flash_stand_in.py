"""What the CUDA flash attention ops compute, with their quirks, on any device and dtype.

From csrc/flash_attn/flash_api.cpp of Dao-AILab/flash-attention and PyTorch's copy of it. Tests that
need a GPU hold the kernels to the real op.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ringattn.kernels.flash_op import Lengths, Window


@dataclass
class StandInFlash:
    """Implements `ringattn.kernels.flash_op.FlashOp`. Counts its forward calls."""

    calls: list[Lengths | None] = field(default_factory=list)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: Lengths | None,
        window: Window,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out, and lse (B, H, Tq) or (H, Tq) with +inf where a row attends nothing."""
        self.calls.append(lengths)
        _check_operands(q, k, v)
        out, lse = torch.full_like(q, float("nan")), _lse_like(q)
        for q_rows, k_rows, longest_k in _sequences(q, k, lengths):
            qs, ks, vs = q[q_rows], k[k_rows], v[k_rows]
            score = _scores(qs, ks, window, longest_k, scale)
            top = score.amax(-1, keepdim=True) if ks.shape[-3] else score.new_zeros(())
            top = torch.where(torch.isinf(top), 0.0, top)
            prob = (score - top).exp()
            total = prob.sum(-1, keepdim=True)
            prob = prob / torch.where(total == 0, 1.0, total)
            group = q.shape[-2] // k.shape[-2]
            out[q_rows] = (prob @ _heads_first(vs, group)).transpose(-2, -3).to(q.dtype)
            row_lse = torch.where(total == 0, float("inf"), total.log() + top).squeeze(-1)
            lse[_lse_rows(q_rows)] = row_lse.to(lse.dtype)
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        lengths: Lengths | None,
        window: Window,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients in the inputs' dtype, with the lse that is given and delta from `out`."""
        _check_operands(q, k, v)
        assert lse.is_contiguous(), "the op reads lse without strides"
        assert lse.shape == _lse_like(q).shape
        assert not torch.isneginf(lse).any(), "the op itself marks rows without keys with +inf"
        assert out.dtype == dout.dtype == q.dtype
        assert out.shape == dout.shape == q.shape
        dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
        group = q.shape[-2] // k.shape[-2]
        for q_rows, k_rows, longest_k in _sequences(q, k, lengths):
            qs, ks, vs = q[q_rows], k[k_rows], v[k_rows]
            score = _scores(qs, ks, window, longest_k, scale)
            prob = (score - lse[_lse_rows(q_rows)].unsqueeze(-1)).exp()
            do, o = _heads_first(dout[q_rows], 1), _heads_first(out[q_rows], 1)
            delta = (do * o).sum(-1, keepdim=True)
            dscore = prob * (do @ _heads_first(vs, group).transpose(-1, -2) - delta) * scale
            dq[q_rows] = (dscore @ _heads_first(ks, group)).transpose(-2, -3).to(q.dtype)
            dk[k_rows] = _sum_group(dscore.transpose(-1, -2) @ _heads_first(qs, 1), group, k.dtype)
            dv[k_rows] = _sum_group(prob.transpose(-1, -2) @ do, group, v.dtype)
        return dq, dk, dv


def _check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    assert k.shape == v.shape
    assert q.shape[-2] % k.shape[-2] == 0


def _sequences(
    q: torch.Tensor, k: torch.Tensor, lengths: Lengths | None
) -> list[tuple[tuple, tuple, int]]:
    """(index of rows, index of keys, longest key count that the kernel sees) of each sequence."""
    if lengths is None:
        assert q.dim() == k.dim() == 4
        return [((slice(None),), (slice(None),), k.shape[1])]
    assert q.dim() == k.dim() == 3
    q_starts, k_starts = lengths.q_starts, lengths.k_starts
    assert q_starts.dtype == k_starts.dtype == torch.int32
    assert q_starts.shape == k_starts.shape
    assert (q_starts[0], q_starts[-1]) == (0, q.shape[0])
    assert (k_starts[0], k_starts[-1]) == (0, k.shape[0])
    q_counts, k_counts = q_starts.diff(), k_starts.diff()
    assert lengths.longest_q >= q_counts.max()
    assert lengths.longest_k >= k_counts.max()
    if lengths.longest_q == 1:
        assert bool((q_counts == 1).all()), "a longest of 1 means one row in every sequence"
    q_ranges = [(slice(a, b),) for a, b in pairwise(q_starts.tolist())]
    k_ranges = [(slice(a, b),) for a, b in pairwise(k_starts.tolist())]
    return [(a, b, lengths.longest_k) for a, b in zip(q_ranges, k_ranges, strict=True)]


def _lse_like(q: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    *batch, rows, heads, _ = q.shape
    return q.new_full((*batch, heads, rows), float("nan"), dtype=dtype)


def _lse_rows(rows: tuple) -> tuple:
    return (..., *rows)


def _heads_first(x: torch.Tensor, group: int) -> torch.Tensor:
    """(..., T, H, D) → (..., H * group, T, D) in float64."""
    return x.double().transpose(-2, -3).repeat_interleave(group, -3)


def _sum_group(x: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """(..., H * group, T, D) → (..., T, H, D); the op rounds before it sums."""
    return x.to(dtype).unflatten(-3, (-1, group)).sum(-3).transpose(-2, -3)


def _scores(
    q: torch.Tensor, k: torch.Tensor, window: Window, longest_k: int, scale: float
) -> torch.Tensor:
    group = q.shape[-2] // k.shape[-2]
    score = _heads_first(q, 1) @ _heads_first(k, group).transpose(-1, -2) * scale
    left, right = (-1 if side >= longest_k else side for side in window)
    causal = left < 0 and right == 0
    if left < 0 and right < 0:
        return score
    left, right = (longest_k if side < 0 else side for side in (left, right))
    rows, keys = q.shape[-3], k.shape[-3]
    distance = torch.arange(keys) - torch.arange(rows).unsqueeze(-1) - (keys - rows)
    hidden = distance > right
    if not causal:
        hidden |= distance < -left
    return score.masked_fill(hidden, float("-inf"))

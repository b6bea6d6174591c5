"""The flash attention op that the windowed adapters call, and PyTorch's CUDA one."""

from typing import NamedTuple, Protocol

import torch
from torch.nn import attention


class Lengths(NamedTuple):
    """Sequences of a variable-length call: int32 starts (n + 1,) on the device, longest lengths."""

    q_starts: torch.Tensor
    k_starts: torch.Tensor
    longest_q: int
    longest_k: int


Window = tuple[int, int]
"""(left, right), aligned bottom-right; -1 is open. (-1, 0) is causal."""


class FlashOp(Protocol):
    """One attention op over windowed sequences.

    Without lengths operands are (B, T, H, D) and lse (B, H, Tq); with lengths they are (T, H, D)
    and lse (H, Tq). Key heads divide query heads. Outputs have the inputs' dtype, lse is float32
    (float64 for float64 inputs).
    """

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: Lengths | None,
        window: Window,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse). Rows without keys have out 0 and lse of either infinity."""
        ...

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
        """(dq, dk, dv) with probabilities exp(score - lse) and delta = rowsum(dout * out).

        lse is contiguous.
        """
        ...


class AtenFlash:
    """aten ``_flash_attention_forward`` and ``_flash_attention_backward``.

    What the op does is in PyTorch's aten/src/ATen/native/transformers/cuda, attention_backward.cu
    and flash_attn/flash_api.cpp: windows aligned bottom-right, lse natural and float32, (B, H, Tq)
    or (H, Tq), +inf for rows without keys; the backward reads lse densely, recomputes delta from
    `out`, returns gradients in the inputs' dtype and sums those of a key head's query heads there.

    Args:
        implementation: a name in PyTorch's registry, or None for PyTorch's own kernels
            (FlashAttention-2). The registry swaps the op for the whole process; it is switched
            when the first call finds another one active, and left so.
    """

    def __init__(self, implementation: str | None = None) -> None:
        self._implementation = implementation

    def _activate(self) -> None:
        if attention.current_flash_attention_impl() == self._implementation:
            return
        if self._implementation is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(self._implementation)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: Lengths | None,
        window: Window,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `FlashOp.forward`."""
        self._activate()
        causal, left, right = window_arguments(window)
        out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
            q,
            k,
            v,
            *_length_arguments(q, k, lengths),
            0.0,  # dropout_p
            causal,
            False,  # return_debug_mask
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
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
        """See `FlashOp.backward`."""
        self._activate()
        causal, left, right = window_arguments(window)
        return torch.ops.aten._flash_attention_backward.default(
            dout,
            q,
            k,
            v,
            out,
            lse,
            *_length_arguments(q, k, lengths),
            0.0,  # dropout_p
            causal,
            torch.zeros(2, dtype=torch.uint64, device=q.device),  # rng_state
            torch.empty(0, device=q.device),  # unused
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )


def window_arguments(window: Window) -> tuple[bool, int | None, int | None]:
    """is_causal, window_size_left and window_size_right.

    Causal and full go without window sizes: FA4 as PyTorch 2.11 registers it bears none.
    """
    if window in ((-1, -1), (-1, 0)):
        return window == (-1, 0), None, None
    return False, *window


def _length_arguments(
    q: torch.Tensor, k: torch.Tensor, lengths: Lengths | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """cum_seq_q, cum_seq_k, max_q, max_k."""
    if lengths is None:
        return None, None, q.shape[1], k.shape[1]
    return lengths.q_starts, lengths.k_starts, lengths.longest_q, lengths.longest_k

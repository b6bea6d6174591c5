"""Local attention over PyTorch's own CUDA flash op, which is FlashAttention-2."""

import torch

from ringattn.kernels.flash_op import AtenFlash, FlashOp
from ringattn.kernels.gpu_limits import capability, refuse_half
from ringattn.kernels.window_kernel import WindowKernel

LARGEST_DIM = 256


class FlashKernel(WindowKernel):
    """Implements `ringattn.kernels.base.Kernel`; see `window_kernel` for how.

    Args:
        op: the op; PyTorch's by default.
    """

    def __init__(self, op: FlashOp | None = None) -> None:
        super().__init__("flash", op or AtenFlash())

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Needs compute capability 8.0, 16 bits, equal head dims, multiples of 8 up to 256."""
        reason = refuse_half(
            device,
            dtype,
            head_dim,
            softcap,
            largest_dim=LARGEST_DIM,
            equal_dims=True,
            op="PyTorch's flash op",
        )
        if reason is None and not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch was built without flash attention"
        if reason is None and capability() < (8, 0):
            return f"compute capability {capability()} is below (8, 0)"
        return reason

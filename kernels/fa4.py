"""Local attention over FlashAttention-4, as registered with PyTorch (Hopper, Blackwell)."""

import torch
from torch.nn.attention import _fa4

from ringattn.kernels.flash_op import AtenFlash, FlashOp
from ringattn.kernels.registered_flash import refuse_registered
from ringattn.kernels.window_kernel import WindowKernel

IMPLEMENTATION = "FA4"
MODULE = "flash_attn.cute.interface"
MAJORS = (9, 10)
LARGEST_DIM = 128


class Fa4Kernel(WindowKernel):
    """Implements `ringattn.kernels.base.Kernel`; see `window_kernel` for how.

    Its first call activates FA4 in PyTorch's registry, for the whole process.

    Args:
        op: the op; the registered one by default.
    """

    def __init__(self, op: FlashOp | None = None) -> None:
        super().__init__("fa4", op or AtenFlash(IMPLEMENTATION))

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Needs FA4 installed, a GPU it has kernels for, and what `flash` needs; D up to 128."""
        if not hasattr(_fa4, "_aten_to_fa4_window_size"):
            return f"PyTorch {torch.__version__} registers FA4 without windows"
        return refuse_registered(
            IMPLEMENTATION,
            MODULE,
            MAJORS,
            device=device,
            dtype=dtype,
            head_dim=head_dim,
            softcap=softcap,
            largest_dim=LARGEST_DIM,
        )

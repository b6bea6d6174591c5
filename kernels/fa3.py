"""Local attention over FlashAttention-3, as registered with PyTorch (Hopper)."""

import torch

from ringattn.kernels.flash_op import AtenFlash, FlashOp
from ringattn.kernels.registered_flash import refuse_registered
from ringattn.kernels.window_kernel import WindowKernel

IMPLEMENTATION = "FA3"
MODULE = "flash_attn_interface"
MAJORS = (9,)
LARGEST_DIM = 256


class Fa3Kernel(WindowKernel):
    """Implements `ringattn.kernels.base.Kernel`; see `window_kernel` for how.

    Its first call activates FA3 in PyTorch's registry, for the whole process.

    Args:
        op: the op; the registered one by default.
    """

    def __init__(self, op: FlashOp | None = None) -> None:
        super().__init__("fa3", op or AtenFlash(IMPLEMENTATION))

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Needs FA3 installed, a GPU it has kernels for, and what `flash` needs; D up to 256."""
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

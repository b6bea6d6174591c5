"""Kernels by name, and the choice among them.

A new kernel is one file and one line in `_registry`, which lists the candidates for "auto" from
first choice to last; the last one, `matmul`, takes everything.
"""

from collections.abc import Callable

import torch

from ringattn.errors import UserError
from ringattn.kernels.base import Kernel
from ringattn.kernels.cpu_flash import CpuFlashKernel
from ringattn.kernels.matmul import MatmulKernel
from ringattn.kernels.triton_band import TritonBandKernel


def _registry() -> dict[str, Callable[[], Kernel]]:
    return {"cpu_flash": CpuFlashKernel, "triton": TritonBandKernel, "matmul": MatmulKernel}


def kernel_names() -> tuple[str, ...]:
    """Names that `kernel_by_name` knows, in the order in which "auto" tries them."""
    return tuple(_registry())


def kernel_by_name(name: str) -> Kernel:
    """The kernel called `name`. Raises UserError for an unknown name."""
    registry = _registry()
    if name not in registry:
        raise UserError(
            f"kernel={name}", "is not a known kernel", f"use auto or one of {', '.join(registry)}"
        )
    return registry[name]()


def choose_kernel(
    name: str,
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: tuple[int, int],
    softcap: float | None = None,
) -> Kernel:
    """The kernel for such inputs.

    Args:
        name: a kernel's name, or "auto" for the first that does not refuse.
        device: device type, "cpu" or "cuda".
        dtype: dtype of q, k and v.
        head_dim: (D of queries and keys, D of values).
        softcap: see `dense_attention`.

    Raises:
        UserError: unknown name, or the named kernel cannot run such inputs.
    """
    candidates = kernel_names() if name == "auto" else (name,)
    reasons = []
    for candidate in candidates:
        kernel = kernel_by_name(candidate)
        reason = kernel.refusal(device=device, dtype=dtype, head_dim=head_dim, softcap=softcap)
        if reason is None:
            return kernel
        reasons.append(f"{candidate}: {reason}")
    raise UserError(f"kernel={name}", "; ".join(reasons), "use kernel=auto or another dtype")

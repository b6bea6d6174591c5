"""Kernels by name, and the choice among them.

A new kernel is one file and one line in `_registry`. "auto" asks kernels in the order of their
measured speed on work like the one at hand (`ringattn.kernels.measured`), and where nothing near
it was measured on such a device, in a stated order (`default_order`). `matmul` takes everything.
"""

from collections.abc import Callable

import torch

from ringattn.errors import UserError
from ringattn.kernels.base import Kernel
from ringattn.kernels.cpu_flash import CpuFlashKernel
from ringattn.kernels.cudnn import CudnnKernel
from ringattn.kernels.fa3 import Fa3Kernel
from ringattn.kernels.fa4 import Fa4Kernel
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.flex import FlexKernel
from ringattn.kernels.matmul import MatmulKernel
from ringattn.kernels.measured import Table, Work, shipped_table
from ringattn.kernels.triton_band import TritonBandKernel

_LIBRARY = ("fa4", "fa3", "cudnn", "flash")  # fastest first; for plain work
_ANY_TILES = ("triton", "flex")
_CPU = ("cpu_flash",)
_FALLBACK = ("matmul",)


def _registry() -> dict[str, Callable[[], Kernel]]:
    return {
        "cpu_flash": CpuFlashKernel,
        "fa4": Fa4Kernel,
        "fa3": Fa3Kernel,
        "cudnn": CudnnKernel,
        "flash": FlashKernel,
        "triton": TritonBandKernel,
        "flex": FlexKernel,
        "matmul": MatmulKernel,
    }


def kernel_names() -> tuple[str, ...]:
    """Names that `kernel_by_name` knows."""
    return tuple(_registry())


def kernel_by_name(name: str) -> Kernel:
    """The kernel called `name`. Raises UserError for an unknown name."""
    registry = _registry()
    if name not in registry:
        raise UserError(
            f"kernel={name}", "is not a known kernel", f"use auto or one of {', '.join(registry)}"
        )
    return registry[name]()


def default_order(device: str, work: Work | None, softcap: float | None) -> tuple[str, ...]:
    """Known kernels from first choice to last, where no measurement says otherwise.

    On a GPU the libraries' kernels come first for plain causal, full and document masks without
    softcap and with equal head dims, and `triton` for everything else; `matmul` comes last. On the
    CPU it is `cpu_flash`, then `matmul`.
    """
    simple = work is not None and work.plain and not work.blocks and work.qk_dim == work.v_dim
    ahead = (*_LIBRARY, *_ANY_TILES) if simple and softcap is None else (*_ANY_TILES, *_LIBRARY)
    if device == "cpu":
        # Triton's interpreter and FlexAttention run there too, only slower than the fallback.
        ahead = (*_CPU, *_FALLBACK)
    known = kernel_names()
    rest = (name for name in known if name not in (*ahead, *_FALLBACK))
    return tuple(name for name in dict.fromkeys((*ahead, *rest, *_FALLBACK)) if name in known)


def kernel_order(
    *,
    device: str,
    dtype: torch.dtype,
    softcap: float | None = None,
    work: Work | None = None,
    architecture: str | None = None,
    table: Table | None = None,
) -> tuple[str, ...]:
    """Known kernels from first choice to last for such inputs, usable or not.

    Kernels measured on work like this come first, the fastest at the head; others follow in
    `default_order`. Arguments as in `choose_kernels`; the shipped table by default. The table was
    measured without softcap, and what it says is not used with one.
    """
    order = default_order(device, work, softcap)
    if work is None or softcap is not None:
        return order
    table = shipped_table() if table is None else table
    scores = table.scores(device if architecture is None else architecture, dtype, work)
    measured = sorted((n for n in order if n in scores), key=lambda n: -scores[n])
    return (*measured, *(name for name in order if name not in scores))


def choose_kernels(
    name: str,
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: tuple[int, int],
    softcap: float | None = None,
    work: Work | None = None,
    architecture: str | None = None,
    table: Table | None = None,
) -> tuple[Kernel, ...]:
    """The kernels for such inputs, from first choice to last; at least one.

    Args:
        name: a kernel's name, or "auto" for all that do not refuse.
        device: device type, "cpu" or "cuda".
        dtype: dtype of q, k and v.
        head_dim: (D of queries and keys, D of values).
        softcap: see `dense_attention`.
        work: what it is to compute, if known. Depends on the plan alone: nothing waits for the
            device, and equal plans choose alike.
        architecture: see `architecture_of`; the device type by default.
        table: measured speeds; the shipped ones by default.

    Raises:
        UserError: unknown name, or no kernel can run such inputs; with each one's reason.
    """
    candidates = (name,)
    if name == "auto":
        candidates = kernel_order(
            device=device, dtype=dtype, softcap=softcap, work=work, architecture=architecture,
            table=table,
        )  # fmt: skip
    reasons, usable = [], []
    for candidate in candidates:
        kernel = kernel_by_name(candidate)
        reason = kernel.refusal(device=device, dtype=dtype, head_dim=head_dim, softcap=softcap)
        if reason is None:
            usable.append(kernel)
        else:
            reasons.append(f"{candidate}: {reason}" if name == "auto" else reason)
    if not usable:
        fix = "use another dtype" if name == "auto" else "use kernel=auto"
        raise UserError(f"kernel={name}", "; ".join(reasons), fix)
    return tuple(usable)


def choose_kernel(
    name: str,
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: tuple[int, int],
    softcap: float | None = None,
    work: Work | None = None,
) -> Kernel:
    """The first of `choose_kernels`."""
    return choose_kernels(
        name, device=device, dtype=dtype, head_dim=head_dim, softcap=softcap, work=work
    )[0]

"""Flash attention implementations of PyTorch's registry: whether one can be used."""

from importlib.util import find_spec

import torch
from torch.nn import attention

from ringattn.kernels.gpu_limits import capability, refuse_half


def refuse_registered(
    implementation: str,
    module: str,
    majors: tuple[int, ...],
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: tuple[int, int],
    softcap: float | None,
    largest_dim: int,
) -> str | None:
    """Why a registered implementation cannot take such inputs, or None.

    PyTorch registers its names whether or not their packages are there, so `module`, which the
    implementation imports when it is activated, is looked for as well.

    Args:
        implementation: name in PyTorch's registry.
        module: the Python module with its kernels.
        majors: major compute capabilities that it has kernels for.
        device, dtype, head_dim, softcap, largest_dim: as in `refuse_half`.
    """
    reason = refuse_half(
        device,
        dtype,
        head_dim,
        softcap,
        largest_dim=largest_dim,
        equal_dims=True,
        op=f"PyTorch's {implementation}",
    )
    if reason is not None:
        return reason
    known = attention.list_flash_attention_impls()
    if implementation not in known:
        return f"{implementation} is not in PyTorch's registry ({', '.join(known) or 'empty'})"
    if not _is_installed(module):
        return f"{implementation} is not installed: there is no Python module {module}"
    if capability()[0] not in majors:
        return f"compute capability {capability()} has no {implementation} kernels"
    return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # a parent package is missing or does not import
        return False

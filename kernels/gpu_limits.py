"""What the fused CUDA kernels refuse in common, as text with value and rule."""

import torch

HALF = (torch.float16, torch.bfloat16)


def refuse_half(
    device: str,
    dtype: torch.dtype,
    head_dim: tuple[int, int],
    softcap: float | None,
    *,
    largest_dim: int,
    equal_dims: bool,
    op: str,
) -> str | None:
    """Why a 16-bit CUDA op cannot take such inputs, or None.

    Args:
        device, dtype, head_dim, softcap: as in `Kernel.refusal`.
        largest_dim: largest head dim; head dims are multiples of 8.
        equal_dims: whether head dims of keys and values have to be equal.
        op: the op's name, for the text.
    """
    if device != "cuda":
        return f"device {device} is not a CUDA GPU"
    if not torch.cuda.is_available():
        return f"device {device} is not there: this PyTorch sees no CUDA GPU"
    if dtype not in HALF:
        return f"dtype {dtype} is neither float16 nor bfloat16"
    if equal_dims and head_dim[0] != head_dim[1]:
        return f"head dims of keys and values {head_dim} differ"
    if any(dim % 8 or not 0 < dim <= largest_dim for dim in head_dim):
        return f"head dims {head_dim} are not multiples of 8 up to {largest_dim}"
    if softcap:
        return f"softcap {softcap} is not supported by {op}"
    return None


def capability() -> tuple[int, int]:
    """Compute capability (major, minor) of the current CUDA device."""
    return torch.cuda.get_device_capability()

"""Band kernels with small blocks, for Triton's interpreter."""

import torch

from ringattn.kernels.triton_band import TritonBandKernel
from ringattn.kernels.triton_configs import BlockConfig, Part

PARTS: tuple[Part, ...] = ("forward", "keys", "keys_only", "queries")
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
"""Relative errors: of float32's sums; of 16-bit inputs and probabilities' rounding."""


def band_kernel(variant: str, blocks: tuple[int, int] = (32, 16)) -> TritonBandKernel:
    """A kernel by words: "tma" or not, "deterministic" or not; `blocks` of rows and columns."""
    config = BlockConfig(*blocks, warps=4, stages=1, tma="tma" in variant)
    return TritonBandKernel(dict.fromkeys(PARTS, config), "deterministic" in variant)

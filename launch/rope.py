"""Rotary position embedding: frequencies, tables and their application.

Shape suffixes are those of `ringattn.launch.model`.
"""

import math

import torch

from ringattn.launch.model_config import ModelConfig, RopeScaling


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> torch.Tensor:
    """Rotary frequencies theta^(-2i/D), scaled for long context: float64 (D/2,), radians/token."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    freq = theta**-exponent
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    turns = scaling.original_max_seq_len * freq / (2 * math.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: keep the frequency, 0: divide it
    return (1 - kept) * freq / scaling.factor + kept * freq


def rope_table(positions_BT: torch.Tensor, cfg: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 (B or 1, T, 1, D), for integer positions (T,) or (B, T).

    Angles are formed in float64: at position 10^6 a float32 angle is wrong by up to 0.03 radians.
    """
    if positions_BT.dim() == 1:
        positions_BT = positions_BT[None]
    freq = rope_frequencies(
        cfg.head_dim, cfg.rope_theta, cfg.rope_scaling, device=positions_BT.device
    )
    angle = (positions_BT.to(torch.float64)[..., None] * freq)[:, :, None]
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns channel i with channel i + D/2 (the half-split convention of Hugging Face Llama).

    Computed in float32 (float64 stays float64) and returned in the dtype of `x_BTHD`.
    """
    x = x_BTHD if x_BTHD.dtype == torch.float64 else x_BTHD.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x * cos + rotated * sin).to(x_BTHD.dtype)

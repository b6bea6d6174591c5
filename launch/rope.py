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
    if scaling is not None and scaling.kind == "ntk" and head_dim > 2:
        theta = theta * scaling.factor ** (head_dim / (head_dim - 2))
    freq = theta**-exponent
    if scaling is None or scaling.kind == "ntk":
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    kept = (
        _kept_llama3(freq, scaling)
        if scaling.kind == "llama3"
        else _kept_yarn(theta, freq, scaling)
    )
    return (1 - kept) * freq / scaling.factor + kept * freq


def attention_factor(scaling: RopeScaling | None) -> float:
    """What rotated q and k are multiplied with: 1 for all kinds but "yarn".

    The default 0.1 ln(factor) + 1 is sqrt(1/t) of arXiv:2309.00071, equation 22.
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def _kept_llama3(freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Share of each frequency that is kept undivided, by its turns over the original context."""
    turns = scaling.original_max_seq_len * freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_yarn(theta: float, freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Share of each frequency that is kept undivided, linear in the channel pair's number.

    The ramp's ends are the pairs that turn `beta_fast` and `beta_slow` times over the original
    context, rounded outwards to whole pairs, as published models were trained.
    """
    head_dim = 2 * len(freq)

    def pair(turns: float) -> float:
        wavelength = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), head_dim - 1)
    width = high - low if high != low else 0.001  # a step where both ends fall together
    pairs = torch.arange(len(freq), dtype=torch.float64, device=freq.device)
    return 1 - ((pairs - low) / width).clamp(0, 1)


def rope_table(positions_BT: torch.Tensor, cfg: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 (B or 1, T, 1, D), for integer positions (T,) or (B, T).

    Both carry `attention_factor`. Angles are formed in float64: at position 10^6 a float32 angle is
    wrong by up to 0.03 radians.
    """
    if positions_BT.dim() == 1:
        positions_BT = positions_BT[None]
    freq = rope_frequencies(
        cfg.head_dim, cfg.rope_theta, cfg.rope_scaling, device=positions_BT.device
    )
    angle = (positions_BT.to(torch.float64)[..., None] * freq)[:, :, None]
    angle = torch.cat([angle, angle], dim=-1)
    factor = attention_factor(cfg.rope_scaling)
    return (factor * angle.cos()).float(), (factor * angle.sin()).float()


def apply_rope(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns channel i with channel i + D/2 (the half-split convention of Hugging Face Llama).

    Computed in float32 (float64 stays float64) and returned in the dtype of `x_BTHD`.
    """
    x = x_BTHD if x_BTHD.dtype == torch.float64 else x_BTHD.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x * cos + rotated * sin).to(x_BTHD.dtype)

"""A second decoder, written from the published formulas with loops over heads and no modules.

It reads a state dict with Hugging Face names, computes in float64, and takes no shortcuts: every
query head has its own copy of its key-value head, rotary pairs are complex numbers, and attention
is a masked softmax.
"""

import math

import torch

from ringattn.launch.layers import Attend
from ringattn.launch.model_config import ModelConfig, RopeScaling


def frequency(i: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> float:
    """Radians per token of rotary pair i, case by case as in the Llama 3.1 reference code."""
    freq = 1.0 / theta ** (2 * i / head_dim)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    wavelength = 2 * math.pi / freq
    if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
        return freq
    if wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
        return freq / scaling.factor
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * freq / scaling.factor + smooth * freq


def rotate(x_TD: torch.Tensor, positions: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """Multiplies the complex numbers x[i] + 1j * x[i + D/2] by exp(1j * position * frequency)."""
    half = cfg.head_dim // 2
    freq = torch.tensor(
        [frequency(i, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling) for i in range(half)],
        dtype=torch.float64,
    )
    angle = positions.double()[:, None] * freq
    turned = torch.complex(x_TD[:, :half], x_TD[:, half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([turned.real, turned.imag], dim=1)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def naive_logits(
    state: dict[str, torch.Tensor],
    cfg: ModelConfig,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    allowed: torch.Tensor | list[torch.Tensor],
) -> torch.Tensor:
    """tokens, positions (T,), allowed bool (T, T) or one per layer -> logits float64 (T, V)."""
    w = {name: value.double() for name, value in state.items()}
    x = w["model.embed_tokens.weight"][tokens]
    dim, group = cfg.head_dim, cfg.heads // cfg.kv_heads
    for n in range(cfg.layers):
        p = f"model.layers.{n}."
        sees = allowed if isinstance(allowed, torch.Tensor) else allowed[n]
        h = norm(x, w[p + "input_layernorm.weight"], cfg.norm_eps)
        q, k, v = (h @ w[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for i in range(cfg.heads):
            j = i // group
            q_i = rotate(q[:, i * dim : (i + 1) * dim], positions, cfg)
            k_j = rotate(k[:, j * dim : (j + 1) * dim], positions, cfg)
            scores = (q_i @ k_j.T / math.sqrt(dim)).masked_fill(~sees, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, j * dim : (j + 1) * dim])
        x = x + torch.cat(heads, dim=1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"], cfg.norm_eps)
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        up = h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
    x = norm(x, w["model.norm.weight"], cfg.norm_eps)
    head = "model.embed_tokens.weight" if cfg.tie_embeddings else "lm_head.weight"
    return x @ w[head].T


def dense_attend(allowed: torch.Tensor) -> Attend:
    """Attention over a dense bool mask (Tq, Tk) in the inputs' dtype."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=allowed,
            enable_gqa=True,
        )
        return out.transpose(1, 2)

    return attend

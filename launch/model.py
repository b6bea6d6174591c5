"""A Llama-3-style decoder written for one device.

It knows nothing of parallelism: it receives token ids with their global positions and a callable
that computes attention. Parallelism is applied to it from outside.

Shape suffixes:  B batch  T tokens  C residual width  H query heads  K key-value heads  D head dim
V vocabulary. Parameter names are those of Hugging Face Llama checkpoints.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ringattn.launch.model_config import ModelConfig, RopeScaling

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q (B,T,H,D), k (B,T,K,D), v (B,T,K,D)) -> out (B,T,H,D), all in one dtype."""


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


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 or wider, returned in the dtype of x."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., dim) -> same shape and dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        weight = self.weight.to(wide.dtype)
        return F.rms_norm(wide, wide.shape[-1:], weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the softmax part is the given `attend`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.dim, bias=False)

    def forward(
        self, x_BTC: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        heads = (-1, self.head_dim)  # unflatten also takes a rank's share of no tokens
        q_BTHD = apply_rope(self.q_proj(x_BTC).unflatten(-1, heads), *rope)
        k_BTKD = apply_rope(self.k_proj(x_BTC).unflatten(-1, heads), *rope)
        v_BTKD = self.v_proj(x_BTC).unflatten(-1, heads)
        return self.o_proj(attend(q_BTHD, k_BTKD, v_BTKD).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.up_proj = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.down_proj = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(
        self, x_BTC: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), rope, attend)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything before the output head."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Attend | Sequence[Attend],
    ) -> torch.Tensor:
        """tokens (B, T), positions (T,) or (B, T) -> hidden states (B, T, C)."""
        per_layer = [attend] * len(self.layers) if callable(attend) else list(attend)
        if len(per_layer) != len(self.layers):
            raise ValueError(f"{len(per_layer)} attention callables for {len(self.layers)} layers")
        rope = rope_table(positions_BT, self.cfg)
        x_BTC = self.embed_tokens(tokens_BT)
        for layer, attend_layer in zip(self.layers, per_layer, strict=True):
            x_BTC = layer(x_BTC, rope, attend_layer)
        return self.norm(x_BTC)


class Transformer(nn.Module):
    """Decoder with an output head. Parameters are float32 until cast; `init_weights` fills them.

    Attributes:
        cfg: its `ModelConfig`.
        model: the `Decoder` (`model.embed_tokens`, `model.layers.N`, `model.norm`).
        lm_head: the output head; its weight is the embedding's when `cfg.tie_embeddings`.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Attend | Sequence[Attend],
        *,
        hidden: bool = False,
    ) -> torch.Tensor:
        """Logits of the next token.

        Args:
            tokens_BT: int64 (B, T); T may be one rank's share of a sequence.
            positions_BT: int64 (T,) or (B, T), the tokens' positions in the whole sequence.
            attend: one attention callable for all layers, or one per layer.
            hidden: return the hidden states (B, T, C) before the head instead.

        Returns:
            (B, T, V) in the compute dtype. No communication but what `attend` does.
        """
        hidden_BTC = self.model(tokens_BT, positions_BT, attend)
        return hidden_BTC if hidden else self.lm_head(hidden_BTC)


def init_weights(model: Transformer, seed: int) -> None:
    """Fills every parameter in place: N(0, 0.02), residual outputs / sqrt(2 * layers), norms 1.

    Each parameter draws on the CPU from a generator seeded by (seed, its name), so values depend
    neither on the number of devices nor on the order of modules.
    """
    residual = 0.02 / math.sqrt(2 * model.cfg.layers)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
            continue
        std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        generator = torch.Generator().manual_seed(_seed_of(seed, name))
        values = torch.empty(parameter.shape, dtype=torch.float32)
        values.normal_(0.0, std, generator=generator)
        with torch.no_grad():
            parameter.copy_(values)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch seeds are signed

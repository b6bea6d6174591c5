"""The modules of a decoder layer, and the output head.

Shape suffixes are those of `ringattn.launch.model`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ringattn.kernels import linear_cross_entropy
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.packing import IGNORE
from ringattn.launch.rope import apply_rope

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q (B,T,H,D), k (B,T,K,D), v (B,T,K,D)) -> out (B,T,H,D), all in one dtype."""


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
    """The projections around grouped-query attention, with rotary positions.

    With `cfg.qk_norm` each head's queries and keys are normalised before they are rotated.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.dim, cfg.kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.dim, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None

    def forward(
        self, x_BTC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, C), rotary tables -> q (B, T, H, D), k and v (B, T, K, D)."""
        heads = (-1, self.head_dim)  # unflatten also takes a rank's share of no tokens
        q_BTHD, k_BTKD, v_BTKD = (
            project(x_BTC).unflatten(-1, heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        return apply_rope(q_BTHD, cos, sin), apply_rope(k_BTKD, cos, sin), v_BTKD


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
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attention is the only part that looks across tokens: `attention_inputs` and `after_attention`
    treat each token for itself, so that they can be compiled, and run on some tokens at a time.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def attention_inputs(
        self, x_BTC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, C), rotary tables (B or 1, T, 1, D) -> q (B, T, H, D), k and v (B, T, K, D)."""
        return self.self_attn(self.input_layernorm(x_BTC), cos, sin)

    def after_attention(self, x_BTC: torch.Tensor, out_BTHD: torch.Tensor) -> torch.Tensor:
        """The layer's input and the attention of it -> the layer's output (B, T, C)."""
        x_BTC = x_BTC + self.self_attn.o_proj(out_BTHD.flatten(2))
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))

    def forward(
        self, x_BTC: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.after_attention(x_BTC, attend(*self.attention_inputs(x_BTC, *rope)))


class LMHead(nn.Linear):
    """The output head; with labels it gives the loss, and no logits of all tokens exist."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg.dim, cfg.vocab_size, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_BTC: torch.Tensor, labels_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (..., V); or, with labels, their summed cross entropy. No communication.

        Logits then exist for some tokens at a time (`ringattn.kernels.linear_cross_entropy`). No
        token, or none that counts, gives an exact zero that still reaches the head and the hidden
        states.

        Args:
            hidden_BTC: (..., C); T may be 0.
            labels_BT: int64 (...), `packing.IGNORE` where not counted.

        Returns:
            Logits in the compute dtype, or a float32 scalar.
        """
        if labels_BT is None:
            return super().forward(hidden_BTC)
        return linear_cross_entropy(
            hidden_BTC.flatten(0, -2),
            self.weight,
            labels_BT.flatten(),
            bias_V=self.bias,
            ignore_index=IGNORE,
        )

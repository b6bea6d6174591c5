"""Shapes of the decoder: the configuration dataclass and the named sizes."""

import math
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from ringattn.errors import UserError

ROPE_KINDS = ("linear", "ntk", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Long-context scaling of the rotary frequencies.

    Attributes:
        kind: "linear" divides every frequency by `factor` (position interpolation,
            arXiv:2306.15595); "ntk" raises the base to theta * factor^(D / (D - 2)), which keeps
            the highest frequency and divides the lowest by `factor` (NTK-aware scaling, as stated
            in arXiv:2309.00071); "yarn" divides the frequencies that turn less than `beta_slow`
            times within the original context, keeps those that turn more than `beta_fast` times,
            blends linearly by channel in between, and raises attention logits
            (arXiv:2309.00071); "llama3" divides only those whose wavelength exceeds
            original_max_seq_len / low_freq_factor, keeps those below
            original_max_seq_len / high_freq_factor, and blends in between (Llama 3.1).
        factor: at least 1.
        low_freq_factor, high_freq_factor: read by "llama3" only.
        original_max_seq_len: context before scaling; read by "yarn" and "llama3".
        beta_fast, beta_slow: turns; read by "yarn" only.
        attention_factor: of "yarn": what both q and k are multiplied with, so that logits grow by
            its square; None is 0.1 ln(factor) + 1.
    """

    kind: str = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UserError(
                f"rope_scaling.kind={self.kind!r}", "is unknown", f"use one of {ROPE_KINDS}"
            )
        if not 1 <= self.factor < math.inf:
            raise UserError(
                f"rope_scaling.factor={self.factor}", "must be at least 1", "use 1 or more"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor}",
                f"must lie between 0 and high_freq_factor={self.high_freq_factor}",
                "use 1 and 4, the values of Llama 3.1",
            )
        if self.original_max_seq_len < 1:
            raise UserError(
                f"rope_scaling.original_max_seq_len={self.original_max_seq_len}",
                "must be positive",
                "use the context the model was trained with, in tokens",
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"rope_scaling.beta_slow={self.beta_slow}",
                f"must lie between 0 and beta_fast={self.beta_fast}",
                "use 1 and 32, the values of YaRN",
            )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise UserError(
                f"rope_scaling.attention_factor={self.attention_factor}",
                "must be positive",
                "leave it out for 0.1 ln(factor) + 1",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one Llama-3-style decoder.

    Attributes:
        vocab_size: rows of the embedding and of the output head.
        dim: width of the residual stream.
        layers, heads, kv_heads, head_dim: heads is a multiple of kv_heads; heads * head_dim may
            differ from dim; head_dim is even.
        ffn_dim: hidden width of the SwiGLU block.
        norm_eps: epsilon of RMSNorm.
        rope_theta, rope_scaling: rotary base, and long-context scaling or None.
        tie_embeddings: the output head shares the embedding's weight.
        qkv_bias: queries, keys and values have biases (Qwen2).
        qk_norm: queries and keys are normalised per head before rotation (Qwen3).
        window: sliding-window layers attend so many tokens, themselves included; None for no such
            layer.
        full_every: layers n - 1, 2n - 1, ... of a model with a window attend whole documents;
            0 gives every layer the window.
        max_seq_len: longest context that the model is meant for; `generate` refuses more.

    Raises:
        UserError: a value out of range.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    full_every: int = 0
    max_seq_len: int = 131_072

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"model.{name}={getattr(self, name)}", "must be positive", "use 1 or more"
                )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.heads={self.heads}",
                f"must be a multiple of model.kv_heads={self.kv_heads}",
                f"set model.kv_heads to a divisor of {self.heads}",
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.head_dim={self.head_dim}",
                "must be even, because rotary embedding turns pairs of channels",
                f"use {self.head_dim + 1}",
            )
        if self.window is not None and self.window < 1:
            raise UserError(
                f"model.window={self.window}", "must be positive", "use 4096, or null for none"
            )
        if self.full_every < 0 or (self.full_every and self.window is None):
            raise UserError(
                f"model.full_every={self.full_every}",
                "must be 0 or more, and 0 where model.window is null",
                "set model.window too, or model.full_every=0",
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer the tokens that it attends, itself included; None for all before it."""
        every = self.full_every
        return tuple(
            None if every and (layer + 1) % every == 0 else self.window
            for layer in range(self.layers)
        )


def _llama(vocab_size: int = 128_256, **shape: Any) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, **shape)


MODEL_SIZES: MappingProxyType[str, ModelConfig] = MappingProxyType(
    {
        # Two seconds of CPU for a few steps: tests and first tries.
        "debug": _llama(
            257, dim=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn_dim=384,
            rope_theta=10_000.0, tie_embeddings=True,
        ),
        # Trains on bytes in minutes on two CPU cores. Attention is narrower than the residual
        # stream, because at thousands of bytes per document it is the larger part of the work.
        "demo": _llama(
            257, dim=256, layers=3, heads=4, kv_heads=2, head_dim=32, ffn_dim=768,
            rope_theta=10_000.0,
        ),
        "1b": _llama(
            dim=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn_dim=8192,
            rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True,
        ),
        "8b": _llama(
            dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn_dim=14_336,
            rope_scaling=RopeScaling(factor=8.0),
        ),
        "70b": _llama(
            dim=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn_dim=28_672,
            rope_scaling=RopeScaling(factor=8.0),
        ),
    }
)  # fmt: skip


def model_config(size: str, **overrides: Any) -> ModelConfig:
    """The named size with some fields replaced; an override of None means "as in the size".

    `ffn_dim` follows an overridden `dim` in the size's own ratio, rounded up to a multiple of 32,
    unless it is given too. Nothing else is derived.

    Args:
        size: a key of `MODEL_SIZES`.
        **overrides: fields of `ModelConfig`, `vocab_size` of the tokenizer among them.

    Raises:
        UserError: an unknown size or field, or a shape that `ModelConfig` refuses.
    """
    if size not in MODEL_SIZES:
        raise UserError(
            f"model.size={size!r}", "is no known size", f"use one of {', '.join(MODEL_SIZES)}"
        )
    base = MODEL_SIZES[size]
    known = {field.name for field in fields(ModelConfig)}
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in given:
        if name not in known:
            raise UserError(
                f"model.{name}", "is no field of the model", f"use one of {sorted(known)}"
            )
    if "dim" in given and "ffn_dim" not in given:
        given["ffn_dim"] = 32 * math.ceil(base.ffn_dim * given["dim"] / base.dim / 32)
    return replace(base, **given)

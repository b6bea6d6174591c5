"""What memory and time of a training step are predicted from: model, settings, attention."""

from dataclasses import dataclass
from typing import Literal

Engine = Literal["ddp", "fsdp", "deepspeed"]
Checkpointing = Literal["none", "full", "attention", "sequence"]
Offload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-style decoder.

    Attributes:
        layers, dim, heads, kv_heads, head_dim, ffn_dim, vocab_size: as usual.
        tied: the output head shares the embedding's weight.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    tied: bool

    @property
    def q_width(self) -> int:
        """Numbers of a token's queries, and of its attention output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def layer_products(self) -> int:
        """Weights of a layer's matrix products."""
        attention = self.dim * 2 * (self.q_width + self.kv_width)
        return attention + 3 * self.dim * self.ffn_dim

    @property
    def layer_parameters(self) -> int:
        """All weights of a layer, norms included."""
        return self.layer_products + 2 * self.dim

    @property
    def head_parameters(self) -> int:
        """Weights of the embedding, and of an output head."""
        return self.dim * self.vocab_size

    @property
    def outer_parameters(self) -> int:
        """Weights outside of the layers: embedding, final norm, and a head that is its own."""
        return self.head_parameters * (1 if self.tied else 2) + self.dim

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.layers * self.layer_parameters + self.outer_parameters


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a training step is run.

    Attributes:
        tokens: of one rank and micro-batch: its share of the sequence.
        ranks: over which engines shard: dp × cp.
        micro_batches: per optimizer step.
        bf16: compute in bfloat16, else float32.
        device: "cpu" or "cuda"; operators differ in what they keep.
        engine, zero_stage, reshard, offload: as the keys under ``parallel``.
        checkpointing, recompute, token_tile, offload_kept: as the keys under ``memory``.
        compiled: norms and activations are fused (``train.compile``).
    """

    tokens: int
    ranks: int = 1
    micro_batches: int = 1
    bf16: bool = True
    device: Literal["cpu", "cuda"] = "cuda"
    engine: Engine = "ddp"
    zero_stage: int = 3
    reshard: bool = True
    offload: Offload = "none"
    checkpointing: Checkpointing = "none"
    recompute: float = 0.25
    offload_kept: bool = False
    token_tile: int | None = None
    compiled: bool = False

    @property
    def autocast(self) -> bool:
        """bfloat16 products inside of a float32 model: the residual stream stays float32."""
        return self.bf16 and self.engine == "ddp"

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in matrix products and attention."""
        return 2 if self.bf16 else 4

    @property
    def residual_bytes(self) -> int:
        """Bytes of a number of the residual stream."""
        return 2 if self.bf16 and not self.autocast else 4


@dataclass(frozen=True, kw_only=True)
class AttentionBytes:
    """What one rank's attention needs beside its operands and results, in bytes.

    Attributes:
        arena: slots beyond home and messages of both directions' larger one; stays allocated.
        saved: kept by each layer from its forward to its backward (``attention.save``).
        forward, backward: scratch of the kernels and of the operator, accumulators included.
        kept_rows: share of the rank's rows whose output "sequence" checkpointing keeps.
    """

    arena: float = 0.0
    saved: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    kept_rows: float = 1.0

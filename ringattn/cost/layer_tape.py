"""The operations of one decoder layer, with the bytes that each holds.

Letters: c residual width, q and k widths of queries and of keys, f hidden width of the MLP; each
times the tokens at hand gives the numbers of a tensor. The tapes follow the layer's own code line by
line: what an operator keeps differs between devices, dtypes and autocast, and is stated here.
"""

from ringattn.cost.step_shapes import AttentionBytes, ModelShape, StepSettings
from ringattn.cost.tape import Op, Tape

WIDE = 4
"""Bytes of a number in norms, rotary embedding and statistics."""


class LayerOps:
    """Makes the operations of a layer for a number of tokens.

    Args:
        shape: the model. settings: how the step is run. tokens: of one pass through the operations.
    """

    def __init__(self, shape: ModelShape, settings: StepSettings, tokens: int) -> None:
        self.shape, self.settings, self.tokens = shape, settings, tokens
        self.c, self.f = tokens * shape.dim, tokens * shape.ffn_dim
        self.q, self.k = tokens * shape.q_width, tokens * shape.kv_width
        self.e, self.r = settings.compute_bytes, settings.residual_bytes
        self.fused = settings.device == "cuda" or settings.compiled

    def norm(self, source: str, target: str) -> Op:
        """RMSNorm in float32. PyTorch's CPU operator is a chain that keeps the normalised input."""
        wide = WIDE * self.c
        copied = wide if self.r < WIDE else 0.0
        chain = 0.0 if self.fused else wide
        return Op(
            takes=(source,),
            makes=(target, self.r * self.c),
            keeps=() if copied else (source,),
            saves=copied + chain + WIDE * self.tokens,
            work=copied,
            back_work=copied + (wide if self.fused else 2 * wide),
        )

    def linear(self, source: str, target: str, n_in: float, n_out: float, weights: float) -> Op:
        """A product. Autocast casts a float32 operand, once for every product, and keeps the copy;
        the weight's gradient is made in the compute dtype before it is added up."""
        cast = self.settings.autocast and source.startswith("norm")
        copy = self.e * n_in if cast else 0.0
        wide = WIDE * weights if self.settings.autocast else 0.0
        return Op(
            takes=(source,),
            makes=(target, self.e * n_out),
            keeps=() if cast else (source,),
            saves=copy,
            back_work=max(copy, self.e * weights + wide),
        )

    def rope(self, source: str, target: str, numbers: float) -> Op:
        """Rotary embedding: float32 products of the halves; nothing is kept but the tables."""
        wide, narrow = WIDE * numbers, self.e * numbers
        if self.settings.compiled:
            return Op(takes=(source,), makes=(target, narrow))
        work = 3 * wide if self.e == WIDE else 5 * wide - narrow
        return Op(takes=(source,), makes=(target, narrow), work=work, back_work=3 * wide)

    def inputs(self) -> tuple[Op, ...]:
        """`DecoderLayer.attention_inputs`: "x" -> "q", "k", "v"."""
        shape = self.shape
        return (
            self.norm("x", "norm1"),
            self.linear("norm1", "q_flat", self.c, self.q, shape.dim * shape.q_width),
            self.rope("q_flat", "q", self.q),
            self.linear("norm1", "k_flat", self.c, self.k, shape.dim * shape.kv_width),
            self.rope("k_flat", "k", self.k),
            self.linear("norm1", "v", self.c, self.k, shape.dim * shape.kv_width),
        )

    def attention(self, bytes_: AttentionBytes) -> Op:
        """The attention operator: "q", "k", "v" -> "out"; lse is kept beside it."""
        return Op(
            takes=("q", "k", "v"),
            makes=("out", self.e * self.q),
            keeps=("q", "k", "v", "out"),
            saves=WIDE * self.tokens * self.shape.heads + bytes_.saved,
            work=bytes_.forward,
            back_work=bytes_.backward,
        )

    def outputs(self) -> tuple[Op, ...]:
        """`DecoderLayer.after_attention`: "x", "out" -> "y"."""
        shape, wide = self.shape, self.shape.dim * self.shape.ffn_dim
        hidden = self.e * self.f
        casts = ("o",) if self.r != self.e else ()
        fused = self.settings.compiled
        return (
            self.linear("out", "o", self.q, self.c, shape.dim * shape.q_width),
            Op(takes=("x", "o"), makes=("x1", self.r * self.c), shares=True, casts=casts),
            self.norm("x1", "norm2"),
            self.linear("norm2", "gate", self.c, self.f, wide),
            Op(takes=("gate",), makes=("silu", 0.0 if fused else hidden), keeps=("gate",)),
            self.linear("norm2", "up", self.c, self.f, wide),
            Op(
                takes=("silu", "up"),
                makes=("mlp", hidden),
                keeps=("gate", "up") if fused else ("silu", "up"),
            ),
            self.linear("mlp", "d", self.f, self.c, wide),
            Op(
                takes=("x1", "d"),
                makes=("y", self.r * self.c),
                shares=True,
                casts=("d",) if casts else (),
                holds=("norm2",),
            ),
        )

    def whole(self, bytes_: AttentionBytes) -> Tape:
        """The layer: "x" -> "y"."""
        ops = (*self.inputs(), self.attention(bytes_), *self.outputs())
        return Tape(ops=ops, given=("x", self.r * self.c))

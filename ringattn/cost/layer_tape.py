"""The operations of one decoder layer, with the bytes that each holds.

Letters: c residual width, q and k widths of queries and of keys, f hidden width of the MLP; each
times the tokens at hand gives the numbers of a tensor. The operations follow the layer's own code:
what an operator keeps differs between devices, dtypes and autocast, and is stated here.
"""

from dataclasses import replace

from ringattn.cost.ledger import Ledger
from ringattn.cost.step_shapes import AttentionBytes, ModelShape, StepSettings
from ringattn.cost.tape import Kinds, Made, Op, Tape

WIDE = 4
"""Bytes of a number in norms, rotary embedding and statistics."""
_SCRATCH = Kinds(tensors="", grads="", weights="", retained="")


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
        self.stream = Made("x", float(self.r * self.c))

    def norm(self, source: str, target: str) -> Op:
        """RMSNorm in float32. PyTorch's CPU operator is a chain that keeps the normalised input."""
        wide = WIDE * self.c
        copied = wide if self.r < WIDE else 0.0
        chain = 0.0 if self.fused else wide
        return Op(
            takes=(source,),
            makes=(Made(target, self.r * self.c),),
            keeps=() if copied else (source,),
            saves=copied + chain + WIDE * self.tokens,
            work=copied,
            back_work=copied + (wide if self.fused else 2 * wide),
        )

    def linear(self, source: str, target: str, n_in: float, n_out: float, weights: float) -> Op:
        """A product. Autocast casts a float32 operand, once for every product, and keeps the copy.

        A weight's gradient is made in the compute dtype. Autocast widens it; replicated engines add
        it to a bucket at once, sharded ones keep it until the layer's are reduced.
        """
        cast = self.settings.autocast and source.startswith("norm")
        copy = self.e * n_in if cast else 0.0
        made = (self.e + (WIDE if self.settings.autocast else 0)) * weights
        stays = made if self.settings.engine == "fsdp" else 0.0
        return Op(
            takes=(source,),
            makes=(Made(target, self.e * n_out),),
            keeps=() if cast else (source,),
            saves=copy,
            back_work=max(copy, made - stays),
            leaves=stays,
        )

    def rope(self, source: str, target: str, numbers: float) -> Op:
        """Rotary embedding: float32 products of the halves; nothing is kept but the tables."""
        wide, made = WIDE * numbers, (Made(target, self.e * numbers),)
        if self.settings.compiled:
            return Op(takes=(source,), makes=made)
        work = 3 * wide if self.e == WIDE else 5 * wide - self.e * numbers
        return Op(takes=(source,), makes=made, work=work, back_work=3 * wide)

    def inputs(self) -> tuple[Op, ...]:
        """`DecoderLayer.attention_inputs`: "x" -> "q", "k", "v"."""
        dim, q, k = self.shape.dim, self.shape.q_width, self.shape.kv_width
        return (
            self.norm("x", "norm1"),
            self.linear("norm1", "q_flat", self.c, self.q, dim * q),
            self.rope("q_flat", "q", self.q),
            self.linear("norm1", "k_flat", self.c, self.k, dim * k),
            self.rope("k_flat", "k", self.k),
            self.linear("norm1", "v", self.c, self.k, dim * k),
        )

    def attention(self, bytes_: AttentionBytes) -> Op:
        """The attention operator: "q", "k", "v" -> "out"; lse is kept beside it."""
        return Op(
            takes=("q", "k", "v"),
            makes=(Made("out", self.e * self.q),),
            keeps=("q", "k", "v", "out"),
            saves=self.statistics + bytes_.saved,
            work=bytes_.forward,
            back_work=bytes_.backward,
        )

    @property
    def statistics(self) -> float:
        """Bytes of the tokens' lse."""
        return float(WIDE * self.tokens * self.shape.heads)

    def outputs(self) -> tuple[Op, ...]:
        """`DecoderLayer.after_attention`: "x", "out" -> "y"."""
        dim, wide = self.shape.dim, self.shape.dim * self.shape.ffn_dim
        hidden, stream = self.e * self.f, self.r * self.c
        narrow = self.r != self.e
        fused = self.settings.compiled
        return (
            self.linear("out", "o", self.q, self.c, dim * self.shape.q_width),
            Op(
                takes=("x", "o"),
                makes=(Made("x1", stream),),
                shares=True,
                casts=("o",) if narrow else (),
            ),
            self.norm("x1", "norm2"),
            self.linear("norm2", "gate", self.c, self.f, wide),
            Op(takes=("gate",), makes=(Made("silu", hidden, not fused),), keeps=("gate",)),
            self.linear("norm2", "up", self.c, self.f, wide),
            Op(
                takes=("silu", "up"),
                makes=(Made("mlp", hidden),),
                keeps=("gate", "up") if fused else ("silu", "up"),
            ),
            self.linear("mlp", "d", self.f, self.c, wide),
            Op(
                takes=("x1", "d"),
                makes=(Made("y", stream),),
                shares=True,
                casts=("d",) if narrow else (),
                holds=("norm2",),
            ),
        )


def layer_tape(
    shape: ModelShape, settings: StepSettings, bytes_: AttentionBytes, *, again: bool = False
) -> Tape:
    """One layer on all of a rank's tokens: "x" -> "y".

    Args:
        shape: the model. settings: how it is run. bytes_: of its attention.
        again: the layer as a checkpoint computes it again.
    """
    ops = LayerOps(shape, settings, settings.tokens)
    inputs, outputs = ops.inputs(), ops.outputs()
    if settings.token_tile is not None:
        tile = LayerOps(shape, settings, min(settings.token_tile, settings.tokens))
        qkv = (Made("q", ops.e * ops.q), Made("k", ops.e * ops.k), Made("v", ops.e * ops.k))
        out = Made("y", ops.stream.nbytes)
        products = shape.dim * (shape.q_width + 2 * shape.kv_width)
        inputs = (_tiled(tile, tile.inputs(), ("x",), qkv, products, ops.tokens),)
        products = shape.layer_products - products
        outputs = (_tiled(tile, tile.outputs(), ("x", "out"), (out,), products, ops.tokens),)
    attention = _remembered(ops, bytes_, again=again)
    return Tape(ops=(*inputs, attention, *outputs), given=(ops.stream,))


def _remembered(ops: LayerOps, bytes_: AttentionBytes, *, again: bool) -> Op:
    """The attention of a layer under its checkpointing mode.

    With "attention" the output stays from the first forward on, and the recomputation finds it.
    With "sequence" copies of some rows stay, and the others are computed again.
    """
    op, mode = ops.attention(bytes_), ops.settings.checkpointing
    if mode not in ("attention", "sequence"):
        return op
    share = 1.0 if mode == "attention" else bytes_.kept_rows
    kept = share * (op.makes[0].nbytes + ops.statistics) + bytes_.saved
    out = Made("out", op.makes[0].nbytes, mode == "sequence")
    if not again:
        return replace(op, makes=(out,), retains=kept)
    if mode == "attention":
        return replace(op, makes=(out,), saves=0.0, work=0.0)
    return replace(op, makes=(out,), saves=ops.statistics)


def _tiled(
    tile: LayerOps,
    inner: tuple[Op, ...],
    takes: tuple[str, ...],
    makes: tuple[Made, ...],
    products: float,
    tokens: int,
) -> Op:
    """Operations that run tile by tile, and again in the backward: only their ends are whole.

    Gradients of the weights are summed in float32 over the tiles, beside those of one tile.
    """
    settings = tile.settings
    sizes = {"x": tile.stream, "out": Made("out", tile.e * tile.q)}
    tape = Tape(ops=inner, given=tuple(sizes[name] for name in takes))
    forward, both = Ledger(), Ledger()
    tape.forward(forward, _SCRATCH, grad=False, own_input=False)
    played = tape.forward(both, _SCRATCH, grad=True, own_input=False)
    tape.backward(both, _SCRATCH, played)
    casts = tile.e * products if settings.autocast else 0.0
    each = tile.e + (WIDE if settings.autocast else 0)
    left = tape.weight_gradients
    single = tokens <= tile.tokens
    sums = 0.0 if single else WIDE * products
    whole = sum(made.nbytes for made in makes) if single else 0.0
    stays = tile.e * products if settings.engine == "fsdp" else 0.0
    return Op(
        takes=takes,
        makes=makes,
        keeps=takes,
        work=forward.peak().nbytes - whole + casts,
        back_work=both.peak().nbytes - left + casts + sums + each * products,
        leaves=stays,
    )

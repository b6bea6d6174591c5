"""Bytes of embedding, final norm, output head and loss around the layers."""

from dataclasses import dataclass

from ringattn.cost.layer_tape import WIDE
from ringattn.cost.step_shapes import ModelShape, StepSettings

LOGITS = 1 << 26
"""Logits of one chunk of the loss, as in `ringattn.kernels.linear_loss`."""
BLOCK = 1 << 22
"""Numbers of a weight that a CPU holds once more, as in `ringattn.kernels.linear_products`."""


@dataclass(frozen=True, kw_only=True)
class LossBytes:
    """What the output head with its loss allocates.

    Attributes:
        hidden_kept, weight_kept: float32 gradients of hidden states and weight, from its forward to
            its backward.
        work: one chunk of logits with their copies, and the narrow weight.
        back_work: narrow copies of the gradients.
    """

    hidden_kept: float
    weight_kept: float
    work: float
    back_work: float


def loss_bytes(shape: ModelShape, settings: StepSettings) -> LossBytes:
    """The bytes of `linear_cross_entropy` for a rank's tokens."""
    tokens, dim, classes = settings.tokens, shape.dim, shape.vocab_size
    rows = min(tokens, max(1, LOGITS // classes, dim // 2))
    narrow = settings.compute_bytes < WIDE
    weight = dim * classes
    work = WIDE * rows * (classes + dim)
    if narrow:
        block = min(weight, BLOCK) if settings.device == "cpu" else 0
        work += 2 * rows * (classes + 2 * dim) + (2 + WIDE) * block
        work += 2 * weight if settings.autocast else 0
    copies = 2 * (tokens * dim + weight) if settings.residual_bytes < WIDE else 0
    return LossBytes(
        hidden_kept=WIDE * tokens * dim,
        weight_kept=WIDE * weight,
        work=work,
        back_work=copies,
    )

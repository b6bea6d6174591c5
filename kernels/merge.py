"""The log-sum-exp merge of two partial attention results, and the accumulator dtype."""

import torch

NO_KEY = float("-inf")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_partial(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Merges (part_out, part_lse) into (out, lse), in place.

    Each side is softmax attention over its own keys, normalised by its own lse; the identity is
    (0, -inf), so rows where both sides are -inf stay as they are. Shapes: out (..., E), lse (...).
    With w = sigmoid(part_lse - lse): out <- (1 - w) out + w part_out (Dao et al.,
    FlashAttention-2, arXiv 2307.08691, section 3.1, written for two parts).
    """
    weight = torch.sub(part_lse, lse).sigmoid_()
    weight.masked_fill_(part_lse == NO_KEY, 0.0)  # -inf - (-inf) is NaN
    out.lerp_(part_out, weight.unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)

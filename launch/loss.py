"""Summed cross entropy over one rank's tokens."""

import torch

from ringattn.kernels import linear_cross_entropy
from ringattn.launch.model import Transformer
from ringattn.launch.packing import IGNORE


def cross_entropy_sum(
    model: Transformer, hidden_BTC: torch.Tensor, labels_BT: torch.Tensor
) -> torch.Tensor:
    """Sum over the rank's counted labels of -log p(label), a float32 scalar. No communication.

    Logits exist for some tokens at a time (`ringattn.kernels.linear_cross_entropy`). No token, or
    none that counts, gives an exact zero that still reaches the head and the hidden states.

    Args:
        model: gives the output head, whose weight is a plain tensor.
        hidden_BTC: (B, T, C); T may be 0.
        labels_BT: int64 (B, T), `packing.IGNORE` where not counted.
    """
    return linear_cross_entropy(
        hidden_BTC.flatten(0, 1),
        model.lm_head.weight,
        labels_BT.flatten(),
        bias_V=model.lm_head.bias,
        ignore_index=IGNORE,
    )

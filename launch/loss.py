"""Summed cross entropy over one rank's tokens."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ringattn.launch.model import Transformer
from ringattn.launch.packing import IGNORE

_CHUNK_ELEMENTS = 2**26  # logits alive at once: 256 MiB in float32


def cross_entropy_sum(
    model: Transformer, hidden_BTC: torch.Tensor, labels_BT: torch.Tensor
) -> torch.Tensor:
    """Sum over the rank's counted labels of -log p(label), a float32 scalar. No communication.

    Logits exist for at most `_CHUNK_ELEMENTS` values at a time: longer inputs go through the head
    in chunks whose logits the backward pass computes again. No token, or none that counts, gives an
    exact zero that still reaches every parameter.

    Args:
        model: gives the output head.
        hidden_BTC: (B, T, C); T may be 0.
        labels_BT: int64 (B, T), `packing.IGNORE` where not counted.
    """
    hidden, labels = hidden_BTC.flatten(0, 1), labels_BT.flatten()
    rows = max(1, _CHUNK_ELEMENTS // model.cfg.vocab_size)
    if len(labels) <= rows:
        return _chunk(model, hidden, labels)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(_chunk, model, part, target, use_reentrant=False)
    return total


def _chunk(model: Transformer, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")

"""The model as a plain PyTorch script trains it: SDPA, full checkpointing, logits of all tokens.

Parameters, first values and everything around attention are those of `ringattn.launch.model`, which
is written for one device; nothing of ringattn's attention, loss or memory saving is in it.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ringattn.launch.layers import Attend
from ringattn.launch.model import Transformer, init_weights
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.packing import IGNORE

Attention = Callable[[list[int]], Attend]
"""Document lengths of a sequence -> attention of whole q, k, v of that sequence."""


class PlainTransformer(Transformer):
    """A `Transformer` with the loss over logits of all its tokens."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens_BT: torch.Tensor,
        positions_T: torch.Tensor,
        labels_BT: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """Summed cross entropy of the labels that count, a float32 scalar."""
        logits_BTV = F.linear(self.model(tokens_BT, positions_T, attend), self.lm_head.weight)
        wide = logits_BTV.flatten(0, -2).float()
        return F.cross_entropy(wide, labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def plain_model(
    shape: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype
) -> PlainTransformer:
    """The model with the first weights of every contender, each layer inside a checkpoint."""
    model = PlainTransformer(shape)
    init_weights(model, seed)
    for layer in model.model.layers:
        # What gathers a layer's parameters then hooks in outside of its checkpoint.
        again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = again
    return model.to(device, dtype)


def document_attention(lengths: list[int]) -> Attend:
    """Causal SDPA inside each document, one call per document."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # split, not slices: its backward is one concatenation instead of a sum per document.
        parts = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
        return torch.cat([causal_sdpa(*part) for part in parts], 1)

    return attend


def causal_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)

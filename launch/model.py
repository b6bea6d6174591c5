"""A Llama-3-style decoder written for one device.

It knows nothing of parallelism: it receives token ids with their global positions and a callable
that computes attention. Parallelism is applied to it from outside.

Shape suffixes:  B batch  T tokens  C residual width  H query heads  K key-value heads  D head dim
V vocabulary. Parameter names are those of Hugging Face Llama checkpoints.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ringattn.launch.layers import Attend, DecoderLayer, LMHead, RMSNorm
from ringattn.launch.local_part import write_part
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.rope import rope_table

Fill = Callable[[str, torch.Tensor], None]
"""(name, tensor): writes a parameter's first values into it, in place; the tensor has the whole
parameter's shape, and is plain or a `DTensor` of which this rank's shard is written."""


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything before the output head."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Attend | Sequence[Attend],
    ) -> torch.Tensor:
        """tokens (B, T), positions (T,) or (B, T) -> hidden states (B, T, C)."""
        per_layer = [attend] * len(self.layers) if callable(attend) else list(attend)
        if len(per_layer) != len(self.layers):
            raise ValueError(f"{len(per_layer)} attention callables for {len(self.layers)} layers")
        rope = rope_table(positions_BT, self.cfg)
        x_BTC = self.embed_tokens(tokens_BT)
        for layer, attend_layer in zip(self.layers, per_layer, strict=True):
            x_BTC = layer(x_BTC, rope, attend_layer)
        return self.norm(x_BTC)


class Transformer(nn.Module):
    """Decoder with an output head. Parameters are float32 until cast; `init_weights` fills them.

    Attributes:
        cfg: its `ModelConfig`.
        model: the `Decoder` (`model.embed_tokens`, `model.layers.N`, `model.norm`).
        lm_head: the output head; its weight is the embedding's when `cfg.tie_embeddings`.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        self.lm_head = LMHead(cfg)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        attend: Attend | Sequence[Attend],
        *,
        labels_BT: torch.Tensor | None = None,
        hidden: bool = False,
    ) -> torch.Tensor:
        """Logits of the next token, or the summed loss of given ones.

        Args:
            tokens_BT: int64 (B, T); T may be one rank's share of a sequence.
            positions_BT: int64 (T,) or (B, T), the tokens' positions in the whole sequence.
            attend: one attention callable for all layers, or one per layer.
            labels_BT: int64 (B, T), `packing.IGNORE` where not counted: return their summed cross
                entropy instead, a float32 scalar.
            hidden: return the hidden states (B, T, C) before the head instead.

        Returns:
            (B, T, V) in the compute dtype. No communication but what `attend` does.
        """
        hidden_BTC = self.model(tokens_BT, positions_BT, attend)
        return hidden_BTC if hidden else self.lm_head(hidden_BTC, labels_BT)


def init_weights(model: Transformer, seed: int) -> None:
    """Fills every parameter in place with `random_weights`."""
    fill_weights(model, random_weights(model.cfg, seed))


def fill_weights(model: nn.Module, fill: Fill) -> None:
    """Fills every parameter of a `Transformer` in place, one after another."""
    fill_all(dict(model.named_parameters()), fill)


def fill_all(tensors: Mapping[str, torch.Tensor], fill: Fill) -> None:
    """Fills tensors by name in place, one after another; of a `DTensor` this rank's shard."""
    for name, tensor in tensors.items():
        fill(name, tensor)


def random_weights(cfg: ModelConfig, seed: int) -> Fill:
    """First weights: N(0, 0.02), residual outputs / sqrt(2 * layers), norms 1, biases 0.

    Each parameter draws on the CPU from a generator seeded by (seed, its name), so values depend
    neither on the number of devices nor on the order of modules. A shard takes its part of the
    whole parameter's draw, which exists for as long as one parameter is filled.
    """
    residual = 0.02 / math.sqrt(2 * cfg.layers)

    def fill(name: str, tensor: torch.Tensor) -> None:
        def draw(index: tuple[slice, ...]) -> torch.Tensor:
            if name.endswith("norm.weight"):
                return torch.ones(tensor.shape)[index]
            if name.endswith(".bias"):
                return torch.zeros(tensor.shape)[index]
            std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            generator = torch.Generator().manual_seed(_seed_of(seed, name))
            values = torch.empty(tensor.shape, dtype=torch.float32)
            return values.normal_(0.0, std, generator=generator)[index]

        write_part(tensor, draw)

    return fill


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch seeds are signed

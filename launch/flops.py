"""Parameters and floating-point operations of the decoder, counted without building it."""

from collections.abc import Sequence

from ringattn.launch.model_config import ModelConfig


def matmul_parameters(cfg: ModelConfig) -> int:
    """Weights that every token is multiplied with: all projections and the head.

    The embedding lookup is no product; a tied weight counts once, as the head.
    """
    attention = cfg.dim * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads)
    return cfg.layers * (attention + 3 * cfg.dim * cfg.ffn_dim) + cfg.dim * cfg.vocab_size


def parameters(cfg: ModelConfig) -> int:
    """All parameters of the model: products, norms, and the embedding where it is not tied."""
    norms = cfg.dim * (2 * cfg.layers + 1)
    embedding = 0 if cfg.tie_embeddings else cfg.dim * cfg.vocab_size
    return matmul_parameters(cfg) + norms + embedding


def attention_flops(cfg: ModelConfig, area: int | Sequence[int], *, backward: bool = True) -> int:
    """Operations of the attention core over all layers, by exact mask area.

    Forward: two products (QK^T, PV) of 2 * area * H * D operations. Backward: five products
    (scores again, dP, dV, dQ, dK), 2.5 times the forward. So 14 * area * H * D in all.

    Args:
        cfg: the model's shape.
        area: allowed (query, key) pairs of the mask, or one such number per layer.
        backward: count forward and backward, else the forward alone.
    """
    per_layer = [area] * cfg.layers if isinstance(area, int) else list(area)
    if len(per_layer) != cfg.layers:
        raise ValueError(f"{len(per_layer)} mask areas for {cfg.layers} layers")
    return (14 if backward else 4) * sum(per_layer) * cfg.heads * cfg.head_dim


def flops_per_step(cfg: ModelConfig, tokens: int, mask_area: int | Sequence[int]) -> int:
    """Operations of forward and backward over `tokens` tokens: 6 * matmul_parameters * tokens
    plus attention by exact area. Norms, rotary embedding, softmax and recomputation (activation
    checkpointing) are not counted, as is usual for model FLOPs utilisation (mfu).

    Args:
        cfg: the model's shape.
        tokens: tokens of the step over all ranks.
        mask_area: allowed pairs of the step's masks over all ranks, one number or one per layer.
    """
    return 6 * matmul_parameters(cfg) * tokens + attention_flops(cfg, mask_area)

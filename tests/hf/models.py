"""Tiny random models of transformers, their batch, and what they compute on one device."""

from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {
        "use_sliding_window": True, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Mistral": {"sliding_window": 7},
    "Gemma2": {
        "sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 13,
    },
    "GptOss": {
        "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
LENGTHS = [21, 2, 25]


def build(family: str, seed: int = 0, **values: Any) -> Any:
    """A model in training mode with float32 weights large enough to make attention matter."""
    config = getattr(transformers, f"{family}Config")(**{**BASE, **FAMILIES[family], **values})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


def draw_batch(seed: int = 0, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels): some labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (rows, sum(LENGTHS)), generator=generator)
    labels = ids.clone()
    labels[:, 30:34] = -100
    return ids, labels


def one_device(
    model: Any, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the model's own eager attention, each document by itself.

    Not packed: some models of transformers (GPT-OSS) let packed documents attend each other.
    """
    count = sum(int((part[:, 1:] != -100).sum()) for part in labels.split(LENGTHS, 1))
    total = 0.0
    for tokens, part in zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True):
        loss = model(tokens, labels=part, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters()}

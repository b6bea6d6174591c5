"""Tiny random Hugging Face checkpoints, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
import transformers

from ringattn.launch.model import Transformer
from tests.launch.naive_llama import dense_attend

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500.0,
}  # fmt: skip
FULL, WINDOW = "full_attention", "sliding_attention"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama tied, linear": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
    ),
    "qwen2": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2, all window": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, some window": (
        "Qwen3",
        {
            "head_dim": 8, "use_sliding_window": True, "sliding_window": 7,
            "layer_types": [WINDOW, FULL, WINDOW, FULL],
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 16}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "ministral": (
        "Ministral",
        {"sliding_window": 6, "head_dim": 8, "layer_types": [WINDOW, WINDOW, FULL, WINDOW]},
    ),
}  # fmt: skip


def build(family: str) -> Any:
    """A random model of transformers; its biases and norms are drawn too."""
    name, values = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **values})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    """`save_pretrained`, in several files."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def logits_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Our model's logits of whole sequences (B, T) on one device, each layer with its window."""
    i = torch.arange(tokens.shape[1])
    masks = [
        (i[None] <= i[:, None]) & (i[:, None] - i[None] < (window or len(i)))
        for window in model.cfg.windows
    ]
    with torch.no_grad():
        return model(tokens, i, [dense_attend(mask) for mask in masks])

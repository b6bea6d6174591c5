"""What a `transformers` model must be, to attend over several ranks."""

import inspect
import re
from typing import Any

from torch import nn

from ringattn.errors import UserError, brief
from ringattn.hf_attention import LayerMask

_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "proportional")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def check_model(model: nn.Module, config: Any) -> None:
    """Refuses what looks across tokens elsewhere than in attention."""
    whole: Any = model
    types = set(getattr(config, "layer_types", None) or ())
    strange = [f"layer type {kind}" for kind in sorted(types - set(_LAYER_TYPES))]
    strange += [
        f"{type(module).__name__} {name}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.RNNBase)
    ]
    if getattr(config, "attention_chunk_size", None) and "chunked_attention" in types:
        strange.append("chunked attention")
    if getattr(model, "_is_stateful", False):
        strange.append("a state that is carried over tokens")
    if whole.config.is_encoder_decoder:
        strange.append("cross attention")
    strange += [f"rope_type {kind}" for kind in _rope_types(config) if kind not in _ROPE_TYPES]
    for key in ("output_attentions", "output_router_logits"):
        if getattr(config, key, False):
            strange.append(f"{key}=True")
    takes = inspect.signature(model.forward).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes):
        strange.append("a forward without **kwargs")
    if not whole._can_set_attn_implementation():
        strange.append("attention of its own, which cannot be replaced")
    if strange:
        raise UserError(
            f"{type(model).__name__} with {strange[0]}",
            "is not implemented across ranks",
            "use a decoder with full, causal or windowed attention",
        )


def _rope_types(config: Any) -> list[str]:
    """Kinds of rotary scaling; some follow the longest position at hand."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [entry["rope_type"] for entry in each if "rope_type" in entry]


def layer_masks(config: Any) -> list[LayerMask]:
    """What each layer will ask for, as far as the configuration tells: the layout is chosen by it.

    A wrong guess costs time, not correctness.
    """
    if not getattr(config, "is_causal", True):
        return [LayerMask(causal=False)] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [LayerMask(window=window)] * config.num_hidden_layers
    return [LayerMask(window=window if kind == _LAYER_TYPES[1] else None) for kind in types]


def check_head(model: Any, head: Any, config: Any) -> None:
    scaled = [
        f"{key}={brief(value)}"
        for key, value in config.to_dict().items()
        if re.search(r"logits?_(scal|mult)|lm_head_mult", key) and value not in (None, 1, 1.0)
    ]
    if not isinstance(head, nn.Linear) or scaled or model.base_model is model:
        raise UserError(
            f"the output head of {type(model).__name__} {' '.join(scaled)}".rstrip(),
            "must be one matrix with at most a softcap",
            "use model(**batch).loss",
        )

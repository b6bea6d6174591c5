"""A Hugging Face config.json as a `ModelConfig`, and back.

Read are the decoders whose computation `ringattn.launch.model` is: Llama, Qwen2 (biased queries,
keys and values), Qwen3 (normalised queries and keys), Mistral and Ministral (windows). Whatever a
file asks for beyond that is refused: a key that nobody looked at may change the result.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ringattn.errors import UserError, brief
from ringattn.launch.hf_rope import rope_from_hf, rope_to_hf
from ringattn.launch.model_config import ModelConfig

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "ministral")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
}
_SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_seq_len",
}
_READ = {
    *_SHAPE, "model_type", "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "tie_word_embeddings", "hidden_act", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "original_max_position_embeddings",
}  # fmt: skip
# Of no effect on the logits of a forward pass.
_HARMLESS = {
    "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "dtype",
    "torch_dtype", "transformers_version", "initializer_range", "use_cache", "pretraining_tp",
    "model_max_length", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    "output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder",
}  # fmt: skip
# Refused unless null, or of the value that means "as usual".
_NEUTRAL = {"partial_rotary_factor": 1.0, "is_causal": True}
_MOST = 2**31 - 1
_MOST_LAYERS = 10_000  # every layer gets an entry in lists


def read_hf_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder.

    Raises:
        UserError: no readable config.json, or a model that this program does not compute.
    """
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}", "does not exist", "name a folder with config.json and safetensors files"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}", f"cannot be read ({error})", "download it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}", "must be a JSON object", "download it again")
    return config_from_hf(raw, str(path))


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """`ModelConfig` of a config.json's content.

    Args:
        raw: the content, of transformers 4 or 5.
        where: what errors name.

    Raises:
        UserError: a model type, activation, scaling, layer pattern or key that is not computed,
            or a value of the wrong type or out of range.
    """
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{where}: model_type={kind!r}",
            f"must be one of {', '.join(MODEL_TYPES)}",
            "train it as a transformers model: see ringattn.hf",
        )
    _check_unread(raw, kind, where)
    shape: dict[str, Any] = {ours: _count(raw, key, where) for key, ours in _SHAPE.items()}
    if shape["layers"] > _MOST_LAYERS:
        raise _wrong(where, "num_hidden_layers", shape["layers"], f"must be <= {_MOST_LAYERS}")
    kv_heads = raw.get("num_key_value_heads")
    head_dim = 128 if kind == "qwen3" and "head_dim" not in raw else None
    if raw.get("head_dim") is not None:
        head_dim = _count(raw, "head_dim", where)
    window, full_every = _windows(raw, kind, shape["layers"], where)
    theta, scaling = rope_from_hf(raw, shape["max_seq_len"], where)
    eps = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps < 1:
        raise _wrong(where, "rms_norm_eps", eps, "must be a small positive number")
    if shape["dim"] % shape["heads"] and head_dim is None:
        raise _wrong(where, "hidden_size", shape["dim"], "must be a multiple of the head count")
    return ModelConfig(
        **shape,
        kv_heads=shape["heads"] if kv_heads is None else _count(raw, "num_key_value_heads", where),
        head_dim=shape["dim"] // shape["heads"] if head_dim is None else head_dim,
        norm_eps=float(eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=_flag(raw, "tie_word_embeddings", where),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        window=window,
        full_every=full_every,
    )


def config_to_hf(
    cfg: ModelConfig, *, dtype: str, eos_token_id: int | None = None, seq_len: int | None = None
) -> dict[str, Any]:
    """The config.json of a model; `config_from_hf` of it computes the same.

    Args:
        cfg: the shape.
        dtype: of the weights beside it, "float32" or "bfloat16".
        eos_token_id: end-of-document token.
        seq_len: context that the model was trained on, where that exceeds `cfg.max_seq_len`.

    Raises:
        UserError: no model type has both biases and normalised queries.
    """
    kind = _kind(cfg)
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        **{theirs: getattr(cfg, ours) for theirs, ours in _SHAPE.items()},
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        **rope_to_hf(cfg),
    }
    raw["max_position_embeddings"] = max(cfg.max_seq_len, seq_len or 0)
    if kind in ("llama", "qwen3"):
        raw["attention_bias"] = False
    if kind == "llama":
        raw["mlp_bias"] = False
        return raw
    raw["sliding_window"] = cfg.window
    if kind != "mistral":
        full, windowed = "full_attention", "sliding_attention"
        raw["layer_types"] = [full if w is None else windowed for w in cfg.windows]
    if kind.startswith("qwen"):
        raw["use_sliding_window"] = cfg.window is not None
        raw["max_window_layers"] = 0 if cfg.window is not None else cfg.layers
    return raw


def _kind(cfg: ModelConfig) -> str:
    """The model type that computes the same."""
    if cfg.qkv_bias and cfg.qk_norm:
        raise UserError(
            "a model with qkv_bias and qk_norm",
            f"is none of {', '.join(MODEL_TYPES)}",
            "export a model with one of them",
        )
    if cfg.qkv_bias or cfg.qk_norm:
        return "qwen2" if cfg.qkv_bias else "qwen3"
    if cfg.window is not None:
        return "ministral" if cfg.full_every else "mistral"
    # Llama's own check wants heads that divide the width, whatever their dimension.
    return "llama" if cfg.dim % cfg.heads == 0 else "mistral"


def _check_unread(raw: Mapping[str, Any], kind: str, where: str) -> None:
    """Every key is read, known to be harmless, or empty."""
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise _wrong(where, "hidden_act", activation, "must be silu")
    architectures = raw.get("architectures") or [_ARCHITECTURES[kind]]
    if architectures != [_ARCHITECTURES[kind]]:
        raise _wrong(where, "architectures", architectures, f"must be [{_ARCHITECTURES[kind]}]")
    for key, value in raw.items():
        if key in _READ or key in _HARMLESS or value is None:
            continue
        if value == _NEUTRAL[key] if key in _NEUTRAL else not value:
            continue
        raise _wrong(where, key, value, "is not computed by this model")


def _windows(raw: Mapping[str, Any], kind: str, layers: int, where: str) -> tuple[int | None, int]:
    """(window, full_every) of the file's sliding-window keys."""
    if kind == "llama":
        if raw.get("sliding_window") or raw.get("layer_types"):
            raise _wrong(where, "sliding_window", raw.get("sliding_window"), "is no key of llama")
        return None, 0
    window = raw.get("sliding_window", 4096)
    if kind.startswith("qwen") and not _flag(raw, "use_sliding_window", where):
        window = None
    types = raw.get("layer_types")
    if kind == "mistral" or types is None:
        first = layers if window is None else 0
        if window is not None and kind.startswith("qwen"):
            first = raw.get("max_window_layers", 28)
            if not isinstance(first, int) or isinstance(first, bool) or first < 0:
                raise _wrong(where, "max_window_layers", first, "must be a number of layers")
            first = min(first, layers)
        types = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if not isinstance(types, list) or len(types) != layers:
        raise _wrong(where, "layer_types", types, f"must name {layers} layers")
    unknown = [t for t in types if t not in ("full_attention", "sliding_attention")]
    if unknown:
        raise _wrong(where, "layer_types", unknown[0], "must be full or sliding attention")
    full = [t == "full_attention" for t in types]
    if all(full):
        return None, 0
    if not _is_count(window):
        raise _wrong(where, "sliding_window", window, "must be a positive number of tokens")
    every = full.index(True) + 1 if any(full) else 0
    if full != [bool(every) and (layer + 1) % every == 0 for layer in range(layers)]:
        raise _wrong(
            where, "layer_types", "".join("FW"[not f] for f in full),
            "full layers must be every n-th one",
        )  # fmt: skip
    return window, every


def _count(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if not _is_count(value):
        raise _wrong(where, key, value, "must be a positive integer of 31 bits")
    return value


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key)
    if not (value is None or isinstance(value, bool)):
        raise _wrong(where, key, value, "must be true or false")
    return bool(value)


def _wrong(where: str, key: str, value: object, rule: str) -> UserError:
    fix = "use another checkpoint, or train it through ringattn.hf"
    return UserError(f"{where}: {key}={brief(value)}", rule, fix)

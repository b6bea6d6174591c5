"""Rotary embedding in a Hugging Face config.json: `rope_parameters` (transformers 5), or
`rope_theta` and `rope_scaling` (before)."""

import math
from collections.abc import Mapping
from typing import Any

from ringattn.errors import UserError, brief
from ringattn.launch.model_config import ModelConfig, RopeScaling

_DEFAULT_THETA = 10_000.0
_FIX = "use a checkpoint with default, linear, yarn or llama3 scaling"
_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
        "truncate",
    },
}  # fmt: skip
_ANYWHERE = {
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
}  # fmt: skip


def rope_from_hf(
    raw: Mapping[str, Any], max_seq_len: int, where: str
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config.json.

    Args:
        raw: its content.
        max_seq_len: its max_position_embeddings, the original context where none is named.
        where: what errors name.

    Raises:
        UserError: a scaling that is not computed, or one that is described in part.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise _wrong(where, "rope_parameters", rope, "must be an object")
    theta = rope.get("rope_theta", raw.get("rope_theta", _DEFAULT_THETA))
    if not _is_positive(theta):
        raise _wrong(where, "rope_theta", theta, "must be positive")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KEYS:
        raise _wrong(where, "rope_type", kind, "is not computed by this model")
    for key, value in rope.items():
        if key not in _KEYS[kind] | _ANYWHERE and value is not None:
            raise _wrong(where, key, value, f"is no key of {kind} scaling")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _wrong(where, "partial_rotary_factor", rope["partial_rotary_factor"], "must be 1")
    if kind == "default":
        return float(theta), None
    outer = raw.get("original_max_position_embeddings")
    original = outer or rope.get("original_max_position_embeddings") or max_seq_len
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = max_seq_len / original
    values: dict[str, Any] = {"factor": factor}
    if kind == "llama3":
        values |= {key: rope.get(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        values |= _yarn(rope, where)
    for key, value in values.items():
        if not (_is_positive(value) or (key == "attention_factor" and value is None)):
            raise _wrong(where, key, value, "must be a positive number")
    return float(theta), RopeScaling(kind=kind, original_max_seq_len=int(original), **values)


def rope_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that describe `cfg`'s rotary embedding.

    Transformers has no fixed NTK-aware scaling; a larger base is the same thing.
    """
    theta, scaling = cfg.rope_theta, cfg.rope_scaling
    if scaling is not None and scaling.kind == "ntk" and cfg.head_dim > 2:
        theta *= scaling.factor ** (cfg.head_dim / (cfg.head_dim - 2))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None and scaling.kind != "ntk":
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        if scaling.kind == "yarn":
            rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            if scaling.attention_factor is not None:
                rope["attention_factor"] = scaling.attention_factor
        if scaling.kind in ("llama3", "yarn"):
            rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    return {"rope_parameters": rope}


def _yarn(rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    if rope.get("truncate") is False:
        raise _wrong(where, "truncate", False, "is not computed by this model")
    attention = rope.get("attention_factor")
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and scale and scale_all:
        stretch = math.log(rope.get("factor") or 1.0)
        attention = (0.1 * scale * stretch + 1) / (0.1 * scale_all * stretch + 1)
    return {
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "attention_factor": attention,
    }


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _wrong(where: str, key: str, value: object, rule: str) -> UserError:
    return UserError(f"{where}: {key}={brief(value)}", rule, _FIX)

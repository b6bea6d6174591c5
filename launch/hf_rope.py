"""Rotary embedding in a Hugging Face config.json: `rope_parameters` (transformers 5), or
`rope_theta` and `rope_scaling` (before)."""

import math
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

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
        UserError: a scaling that is not computed, one that is described in part, or a value of
            the wrong type or out of range.
    """
    rope: Mapping[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = raw.get(name)
        if not (given is None or isinstance(given, Mapping)):
            raise _wrong(where, name, given, "must be an object")
        rope = given or rope
    theta = rope.get("rope_theta", raw.get("rope_theta", _DEFAULT_THETA))
    if not _is_positive(theta):
        raise _wrong(where, "rope_theta", theta, "must be positive")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise _wrong(where, "rope_type", kind, "is not computed by this model")
    for key, value in rope.items():
        if key not in _KEYS[kind] | _ANYWHERE and value is not None:
            raise _wrong(where, key, value, f"is no key of {kind} scaling")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _wrong(where, "partial_rotary_factor", rope["partial_rotary_factor"], "must be 1")
    if kind == "default":
        return float(theta), None
    original = _original(raw, rope, max_seq_len, where)
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = max_seq_len / original
    if not _is_positive(factor):
        raise _wrong(where, "factor", factor, "must be a positive number")
    values: dict[str, Any] = {"factor": factor}
    if kind == "llama3":
        values |= {key: rope.get(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        values |= _yarn(rope, factor, where)
    for key, value in values.items():
        if not (_is_positive(value) or (key == "attention_factor" and value is None)):
            raise _wrong(where, key, value, "must be a positive number")
    return float(theta), RopeScaling(kind=kind, original_max_seq_len=original, **values)


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


def _original(raw: Mapping[str, Any], rope: Mapping[str, Any], max_seq_len: int, where: str) -> int:
    """The context before scaling."""
    key = "original_max_position_embeddings"
    named = (source.get(key) for source in (raw, rope))
    original = next((value for value in named if value is not None), max_seq_len)
    if not _is_positive(original) or original != int(original):
        raise _wrong(where, key, original, "must be a positive number of tokens")
    return int(original)


def _yarn(rope: Mapping[str, Any], factor: float, where: str) -> dict[str, Any]:
    if rope.get("truncate", True) is not True:
        raise _wrong(where, "truncate", rope["truncate"], "is not computed by this model")
    scales = [rope.get(key) or 0 for key in ("mscale", "mscale_all_dim")]
    for key, scale in zip(("mscale", "mscale_all_dim"), scales, strict=True):
        if not (scale == 0 or _is_positive(scale)):
            raise _wrong(where, key, scale, "must be a number of at least 0")
    attention = rope.get("attention_factor")
    if attention is None and all(scales):
        # A factor below 1 does not stretch.
        stretch = 0.1 * max(math.log(factor), 0.0)
        attention = (stretch * scales[0] + 1) / (stretch * scales[1] + 1)
    betas = {"beta_fast": 32.0, "beta_slow": 1.0}
    return {
        **{key: usual if rope.get(key) is None else rope[key] for key, usual in betas.items()},
        "attention_factor": attention,
    }


def _is_positive(value: object) -> TypeGuard[int | float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max  # an integer can exceed every float


def _wrong(where: str, key: str, value: object, rule: str) -> UserError:
    return UserError(f"{where}: {key}={brief(value)}", rule, _FIX)

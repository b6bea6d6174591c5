"""Which RoPE scaling a configuration asks for."""

from dataclasses import replace

from ringattn.errors import UserError
from ringattn.launch.config import ModelSection
from ringattn.launch.model_config import ROPE_KINDS, RopeScaling


def resolve_rope(section: ModelSection, base: RopeScaling | None) -> RopeScaling | None:
    """`base` as ``model.rope_scaling``, ``rope_factor`` and ``rope_original_seq_len`` change it.

    What a key leaves open is taken from `base`; another kind keeps factor and original context.

    Args:
        section: of the configuration.
        base: the scaling of the named size, or of the checkpoint that the model is loaded from.

    Raises:
        UserError: an unknown kind, a factor or context that is missing or has no effect.
    """
    kind, factor, original = (
        section.rope_scaling,
        section.rope_factor,
        section.rope_original_seq_len,
    )
    given = {"rope_factor": factor, "rope_original_seq_len": original}
    given = {key: value for key, value in given.items() if value is not None}
    if kind not in (None, "none", *ROPE_KINDS):
        raise UserError(
            f"model.rope_scaling={kind}",
            "is no known scaling",
            f"use none, {', '.join(ROPE_KINDS)}, or null for that of the size",
        )
    if kind == "none" or (kind is None and base is None):
        for key, value in given.items():
            raise UserError(
                f"model.{key}={value}",
                "needs a RoPE scaling",
                f"set model.rope_scaling to one of {', '.join(ROPE_KINDS)}",
            )
        return None
    kind = kind or (base.kind if base else "")
    if base is None:
        _require(kind, factor, original)
        base = RopeScaling(kind=kind)
    scaling = replace(base, kind=kind)
    if factor is not None:
        scaling = replace(scaling, factor=factor)
    return scaling if original is None else replace(scaling, original_max_seq_len=original)


def _require(kind: str, factor: float | None, original: int | None) -> None:
    """A scaling that nothing else describes must be given whole."""
    if factor is None:
        raise UserError(
            f"model.rope_scaling={kind}",
            "needs model.rope_factor",
            "set it to the new context over the old one, e.g. model.rope_factor=8",
        )
    if original is None and kind in ("yarn", "llama3"):
        raise UserError(
            f"model.rope_scaling={kind}",
            "needs model.rope_original_seq_len",
            "set it to the context the model was trained with, e.g. 8192",
        )

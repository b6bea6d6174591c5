"""What a `transformers` model calls in place of its own attention, and of its own masks.

Both are plain functions of their arguments: which plans to use travels with the batch, as the
keyword argument `ringattn`. `**kwargs` of a model swallow anything, so all that is not known to
leave the result alone is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ringattn import masks
from ringattn.context import ContextParallel
from ringattn.errors import UserError, brief
from ringattn.layout import Layout
from ringattn.operators import attention
from ringattn.plan import Plan

NAME = "ringattn"
# Keyword arguments on their way to other parts of a model; they say nothing about attention.
_HARMLESS = {
    "position_ids", "position_embeddings", "shift_labels", "num_items_in_batch", "labels",
    "output_hidden_states", "return_dict", "logits_to_keep", "layer_idx",
}  # fmt: skip
_SHARD = "call the model with what attach(...).shard(...) returns"


@dataclass(frozen=True)
class LayerMask:
    """What a layer attends, as its model describes it.

    Attributes:
        causal: keys at or before their query only.
        window: of causal layers: so many tokens, the query included; None for all.
    """

    causal: bool = True
    window: int | None = None


@dataclass(frozen=True)
class BatchPlans:
    """The plans of one batch, one for each distinct layer mask, all on one layout.

    Attributes:
        cp: the group that shares the batch.
        lengths: of the documents in each row.
        layout: who holds which tokens.
        plans: by layer mask; what is missing is planned when a layer asks for it.
    """

    cp: ContextParallel
    lengths: tuple[int, ...]
    layout: Layout
    plans: dict[LayerMask, Plan] = field(default_factory=dict)

    def plan(self, mask: LayerMask) -> Plan:
        """The plan for a layer. Pure host work, alike on all ranks."""
        if mask not in self.plans:
            documents = document_mask(self.lengths, mask)
            self.plans[mask] = self.cp.plan(documents, layout=self.layout)
        return self.plans[mask]

    def unshard(self, local: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The whole tensor on every rank, from each rank's tokens; see `Plan.unshard`."""
        return next(iter(self.plans.values())).unshard(local, dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchPlans":
        return self  # wrappers copy keyword arguments; plans belong to one group


def document_mask(lengths: tuple[int, ...], mask: LayerMask) -> masks.Mask:
    """A layer's mask over documents packed in one row."""
    return masks.documents(lengths, mask.causal, window=mask.window)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LayerMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    ringattn: BatchPlans | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of `transformers.AttentionInterface`. All ranks communicate.

    Args:
        module: the layer's attention module; its `is_causal` counts where no mask says it.
        query: (B, Hq, T, D), this rank's tokens, rotated. key, value: (B, Hkv, T, D) and E.
        attention_mask: what `describe` made of the model's own mask, or None.
        dropout: must be 0.
        scaling: of the logits; None is 1 / sqrt(D).
        is_causal, sliding_window: as the layer passes them; must agree with the mask.
        softcap: logits become softcap * tanh(logits / softcap).
        s_aux: (Hq,) learned sinks.
        ringattn: the batch's plans.

    Returns:
        (B, T, Hq, E), and None for the weights, which no rank has.

    Raises:
        UserError: anything that would change the result and is not implemented.
    """
    _refuse(kwargs)
    if ringattn is None:
        raise UserError("attention without a sharded batch", "has no plan", _SHARD)
    if dropout:
        raise UserError(
            f"attention dropout {dropout}", "is not implemented", "set attention_dropout=0"
        )
    if key.shape[2] != query.shape[2]:
        raise UserError(
            f"{key.shape[2]} keys for {query.shape[2]} queries",
            "caches and cross attention are not implemented",
            "pass use_cache=False",
        )
    mask = _layer_mask(module, attention_mask, is_causal, sliding_window)
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        ringattn.plan(mask),
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return out, None


def describe(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> LayerMask:
    """The mask function of `transformers.AttentionMaskInterface`: a description, not a tensor.

    The model composes its mask from functions of two token indices; those are recognised by name.
    Documents are left to the batch: a model would guess them from jumps in local positions.

    Raises:
        UserError: a padding mask, a cache, or a mask that is not full, causal or windowed.
    """
    if attention_mask is not None:
        raise UserError(
            "attention_mask",
            "padding is not implemented",
            "leave it out, and pack documents with document_lengths instead of padding them",
        )
    if q_length != kv_length or _is_moved(q_offset) or _is_moved(kv_offset):
        raise UserError("a key-value cache", "is not implemented", "pass use_cache=False")
    causal, window = False, None
    for name, inside in _parts(mask_function):
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":
            window = int(inside["sliding_window"])
        elif name not in _STRUCTURE:
            raise UserError(f"the model's mask {name}", "is not implemented", "use another model")
    return _checked(LayerMask(causal, window))


# Functions that only join or renumber others, and those of documents, which the batch describes.
_STRUCTURE = {
    "and_masks", "bidirectional_mask_function", "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence", "packed_sequence_compatibility_function",
    "add_offsets_to_mask_function",
}  # fmt: skip


def _parts(function: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, closure) of a mask function and of those it is made of."""
    if function is None:
        return
    cells = function.__closure__ or ()
    inside = dict(zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True))
    yield function.__qualname__.split(".")[0], inside
    for value in inside.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if callable(part) and hasattr(part, "__code__"):
                yield from _parts(part)


def _layer_mask(
    module: torch.nn.Module,
    described: LayerMask | None,
    is_causal: bool | None,
    window: int | None,
) -> LayerMask:
    """The layer's mask, once what the model built and what the layer passes are known to agree."""
    if described is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return _checked(LayerMask(bool(causal), window))
    if not isinstance(described, LayerMask):
        raise UserError(
            f"attention_mask of type {type(described).__name__}",
            "masks made outside the model are not implemented",
            "leave attention_mask out",
        )
    if window is not None and window != described.window:
        raise UserError(
            f"sliding_window={window}",
            f"differs from the window of the model's mask, {described.window}",
            "use a model whose layers attend as their masks say",
        )
    return described


def _checked(mask: LayerMask) -> LayerMask:
    if mask.window is not None and not mask.causal:
        raise UserError(
            f"sliding_window={mask.window} of a layer that is not causal",
            "is not implemented",
            "use a causal model",
        )
    return mask


def _refuse(kwargs: dict[str, Any]) -> None:
    """Refuses arguments that nobody here knows; None and False ask for nothing."""
    for name, value in kwargs.items():
        if name not in _HARMLESS and value is not None and value is not False:
            shown = type(value).__name__ if isinstance(value, torch.Tensor) else brief(value)
            raise UserError(
                f"attention argument {name}={shown}", "is not implemented", "leave it out"
            )


def _is_moved(offset: Any) -> bool:
    return bool(offset.any() if isinstance(offset, torch.Tensor) else offset)

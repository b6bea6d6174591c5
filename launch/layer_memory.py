"""Activation memory of a model's decoder layers: token tiles, compilation, checkpointing.

Applied to a `Transformer` from outside, as instance attributes of its layers. What a layer keeps
from forward to backward, for T tokens of this rank (C residual width, H and K heads of size D):

| checkpointing | keeps | computes again |
|---|---|---|
| none | every activation (with tiles: x twice, q, k, v, out, lse) | nothing (tiles: both halves) |
| full | x | everything, attention and its communication included |
| attention | x, out, lse | everything but attention |
| sequence | x, rows of out and lse that are costly | everything but those rows |
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn.errors import UserError
from ringattn.launch.config import Config, MemoryConfig
from ringattn.launch.layers import Attend, DecoderLayer
from ringattn.launch.model import Transformer
from ringattn.parallel.offload import HostStore
from ringattn.parallel.tiling import Part, run_in_tiles

_HALVES = {"attention_inputs": 1, "after_attention": 2}  # first tensors that get gradients
_FEWEST = 2  # tokens that compiled code is made for: sizes 0 and 1 would be compiled for themselves


def apply_memory(model: Transformer, config: Config) -> HostStore | None:
    """Applies ``memory`` and ``train.compile`` to every decoder layer, in place.

    In this order: token tiles and compilation of the two halves around attention, then
    checkpointing around the layer's forward. Call it once, on a model with whole parameters and
    before anything shards them: parameters are looked up by name at every call, so they may be
    replaced. Hooks on a layer stay outside of its checkpoint. No communication.

    Returns:
        The host memory that ``memory.offload`` uses, None without it.
    """
    memory = config.memory
    halves: dict[str, Part] = {name: getattr(DecoderLayer, name) for name in _HALVES}
    if config.train.compile:
        halves = {name: CompiledPart(half) for name, half in halves.items()}
    store = HostStore() if memory.offload else None
    names = parameters_of_halves(model) if memory.token_tile is not None else {}
    for layer in model.model.layers:
        for name, half in halves.items():
            if memory.token_tile is not None:
                run = partial(_tiled, half, layer, names[name], memory.token_tile, _HALVES[name])
                setattr(layer, name, run)
            elif config.train.compile:
                setattr(layer, name, partial(half, layer))
        if memory.checkpointing != "none":
            layer.forward = _Checkpointed(layer.forward, memory, store)
    return store


def _tiled(
    half: Part, layer: nn.Module, names: list[str], tile: int, moving: int, *tensors: torch.Tensor
) -> Any:
    return run_in_tiles(half, layer, names, tile, tensors, moving)


class CompiledPart:
    """A half of a decoder layer, compiled for any number of tokens as one graph.

    All layers share it: parameters are inputs of the graph. Fewer than two tokens, as a rank's
    share may have, run uncompiled.
    """

    def __init__(self, half: Part) -> None:
        self._half = half
        self._compiled = torch.compile(half, fullgraph=True)

    def __call__(self, layer: nn.Module, *tensors: torch.Tensor) -> Any:
        """As the half; tokens are dim 1 of every tensor."""
        if tensors[0].shape[1] < _FEWEST:
            return self._half(layer, *tensors)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return self._compiled(layer, *tensors)


def parameters_of_halves(model: Transformer) -> dict[str, list[str]]:
    """Names, within a layer, of the parameters that each half uses.

    Found by differentiating the halves of a layer without storage for no token at all, so that no
    parameter that a layer gains is forgotten.
    """
    cfg = model.cfg
    with torch.device("meta"):
        layer = DecoderLayer(cfg)
        x = torch.empty(1, 0, cfg.dim)
        angles = torch.empty(1, 0, 1, cfg.head_dim)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found: dict[str, list[str]] = {}
    with torch.enable_grad():
        q, k, v = DecoderLayer.attention_inputs(layer, x, angles, angles)
        outs = {
            "attention_inputs": (q, k, v),
            "after_attention": (DecoderLayer.after_attention(layer, x, q.detach()),),
        }
        for half, made in outs.items():
            total = torch.stack([value.sum() for value in made]).sum()
            grads = torch.autograd.grad(total, parameters, allow_unused=True)
            found[half] = [n for n, grad in zip(names, grads, strict=True) if grad is not None]
    return found


@dataclass(frozen=True, eq=False)
class _Checkpointed:
    """The forward of a layer inside an activation checkpoint."""

    forward: Callable[..., torch.Tensor]
    memory: MemoryConfig
    store: HostStore | None

    def __call__(
        self, x_BTC: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x_BTC, rope, attend)
        bundle = None if self.store is None else self.store.bundle()
        hooks: AbstractContextManager[object] = nullcontext()
        recall: Callable[..., ra.Recall] = ra.Recall
        if bundle is not None:
            put = bundle.put
            hooks = saved_tensors_hooks(put, lambda ticket: ticket.get())
            recall = partial(ra.Recall, put=lambda tensor: put(tensor).get)
        if self.memory.checkpointing == "attention":
            attend = _recalled(attend, recall())
        elif self.memory.checkpointing == "sequence":
            attend = _recalled(attend, recall(share=self.memory.recompute))
        with hooks:  # sees the checkpoint's inputs alone: inside, the checkpoint's own hooks rule
            result = checkpoint(
                self.forward, x_BTC, rope, attend, use_reentrant=False, preserve_rng_state=False
            )
        assert isinstance(result, torch.Tensor)
        return result


def _recalled(attend: Attend, recall: ra.Recall) -> Attend:
    remember = getattr(attend, "recalled", None)
    if remember is None:
        raise UserError(
            f"attention by {type(attend).__name__}",
            "memory.checkpointing=attention and sequence keep what a plan's attention gives",
            "use memory.checkpointing=full",
        )
    return partial(remember, recall)

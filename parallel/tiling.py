"""Computations that treat each token for itself, a tile of tokens at a time.

What lies between inputs and outputs exists for one tile only: the forward keeps no graph, and the
backward computes each tile again. Parameter gradients of the tiles are summed in float32 or wider
and reach autograd once, so that hooks on parameters run once and 16-bit gradients round once.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

Part = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
"""(module, tensors with tokens in dim 1) -> tensors with tokens in dim 1, each token by itself."""


def run_in_tiles(
    part: Part,
    module: nn.Module,
    names: Sequence[str],
    tile: int,
    tensors: Sequence[torch.Tensor],
    moving: int,
) -> Any:
    """``part(module, *tensors)``, computed `tile` tokens at a time. No communication.

    Args:
        part: what to compute.
        module: its parameters are looked up at each call, in the backward too.
        names: parameters that the part uses; gradients reach these alone.
        tile: most tokens at a time; the last tile may have fewer.
        tensors: (B, T, ...); T may be 0.
        moving: so many first tensors get gradients; the others are constants.

    Returns:
        As the part does.
    """
    parameters = [module.get_parameter(name) for name in names]
    wanted = any(x.requires_grad for x in (*tensors[:moving], *parameters))
    if not (torch.is_grad_enabled() and wanted):
        return _all_tiles(part, module, tile, tensors)
    box: list[Any] = []
    held = _Hold.apply(box, moving, torch.empty(0, requires_grad=True), *tensors)
    assert isinstance(held, tuple)
    work = (part, module, tuple(names), tile, box[0])
    outs = _Tiles.apply(work, len(tensors), *held, *tensors[moving:], *parameters)
    assert isinstance(outs, tuple)
    return outs[0] if len(outs) == 1 else outs


def _starts(tokens: int, tile: int) -> range:
    """Where tiles start; no tokens are one tile, so that outputs have a shape."""
    return range(0, max(tokens, 1), tile)


def _as_tuple(values: Any) -> tuple[torch.Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


def _all_tiles(part: Part, module: nn.Module, tile: int, tensors: Sequence[torch.Tensor]) -> Any:
    """The part's outputs, written tile by tile."""
    tokens, single = tensors[0].shape[1], False
    outs: list[torch.Tensor] = []
    for start in _starts(tokens, tile):
        made = part(module, *(t[:, start : start + tile] for t in tensors))
        single = not isinstance(made, tuple)
        if tokens <= tile:
            return made
        pieces = _as_tuple(made)
        outs = outs or [p.new_empty((p.shape[0], tokens, *p.shape[2:])) for p in pieces]
        for out, piece in zip(outs, pieces, strict=True):
            out[:, start : start + tile] = piece
    return outs[0] if single else tuple(outs)


class _Hold(torch.autograd.Function):
    """Passes its tensors on and saves them before anything is computed from them.

    An activation checkpoint that computes again what was saved can then stop before the last
    part's forward, whose outputs nobody needs.
    """

    @staticmethod
    def forward(ctx: Any, box: list[Any], moving: int, _: torch.Tensor, *tensors: torch.Tensor):
        box.append(ctx)
        ctx.save_for_backward(*tensors)
        ctx.rest = len(tensors) - moving
        return tuple(t.view_as(t) for t in tensors[:moving])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        return None, None, None, *grads, *[None] * ctx.rest


class _Tiles(torch.autograd.Function):
    """`_all_tiles` with a backward that computes each tile again."""

    @staticmethod
    def forward(ctx: Any, work: tuple, count: int, *tensors: torch.Tensor):
        part, module, ctx.names, ctx.tile, ctx.held = work
        ctx.part, ctx.module, ctx.count = part, module, count
        ctx.kind = tensors[0].device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.kind), torch.get_autocast_dtype(ctx.kind)
        outs = _as_tuple(_all_tiles(part, module, ctx.tile, tensors[:count]))
        if ctx.autocast[0]:  # what was cast here has no graph and must not be found by others
            torch.clear_autocast_cache()
        return outs

    @staticmethod
    def backward(ctx: Any, *douts: torch.Tensor):
        inputs, needs = ctx.held.saved_tensors, ctx.needs_input_grad[2:]
        parameters = [ctx.module.get_parameter(name) for name in ctx.names]
        wanted = [i for i, need in enumerate(needs) if need]
        sums = _Sums(wanted, ctx.count, inputs, parameters, ctx.tile)
        with _autocast(ctx):
            for start in _starts(inputs[0].shape[1], ctx.tile):
                place = slice(start, start + ctx.tile)
                leaves = [x.detach()[:, place] for x in inputs]
                with torch.enable_grad():
                    for i in wanted:
                        if i < ctx.count:
                            leaves[i].requires_grad_()
                    outs = _as_tuple(ctx.part(ctx.module, *leaves))
                both = [*leaves, *parameters]
                grads = torch.autograd.grad(
                    outs,
                    [both[i] for i in wanted],
                    [dout[:, place] for dout in douts],
                    allow_unused=True,
                )
                del outs
                sums.add(grads, place)
        return None, None, *sums.finish(len(needs))


def _autocast(ctx: Any) -> AbstractContextManager[object]:
    enabled, dtype = ctx.autocast
    return torch.autocast(ctx.kind, dtype, enabled=enabled)


class _Sums:
    """Gradients of all tiles: those of inputs side by side, those of parameters added up."""

    def __init__(
        self,
        wanted: list[int],
        count: int,
        inputs: Sequence[torch.Tensor],
        parameters: Sequence[torch.Tensor],
        tile: int,
    ) -> None:
        self.wanted, self.count = wanted, count
        self.of = [*inputs, *parameters]
        self.single = inputs[0].shape[1] <= tile
        self.found: dict[int, torch.Tensor] = {}

    def add(self, grads: Sequence[torch.Tensor | None], place: slice) -> None:
        """Takes the gradients of one tile."""
        for i, grad in zip(self.wanted, grads, strict=True):
            if grad is None:
                continue
            if self.single:
                self.found[i] = grad
            elif i < self.count:
                if i not in self.found:
                    self.found[i] = torch.zeros_like(self.of[i])
                self.found[i][:, place] = grad
            elif i in self.found:
                self.found[i] += grad
            else:
                wide = torch.promote_types(grad.dtype, torch.float32)
                self.found[i] = grad.to(wide, copy=True)

    def finish(self, count: int) -> list[torch.Tensor | None]:
        """One gradient per input and parameter, None where there is none."""
        return [
            self.found[i].to(self.of[i].dtype) if i in self.found else None for i in range(count)
        ]

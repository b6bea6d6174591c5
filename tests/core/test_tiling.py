"""Token tiles: gradients, what is kept, how often parts run, and mixed precision."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ringattn.parallel.tiling import run_in_tiles
from tests.closeness import assert_close, rel_error

NAMES = ("weight", "bias")
TILES = (1, 3, 8, 20, 64)


class _Part:
    """x, y, constant -> two outputs, through a linear layer; counts its calls."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, module: Any, x: Any, y: Any, c: Any) -> Any:
        self.rows.append(x.shape[1])
        z = torch.nn.functional.linear(x, module.weight, module.bias)
        return (z * c).sin(), (z + y).cos()


def _make(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, list[torch.Tensor]]:
    module = nn.Linear(6, 5, dtype=dtype)
    x, y, c = (torch.randn(2, tokens, n, dtype=dtype) for n in (6, 5, 1))
    return module, [x.requires_grad_(), y.requires_grad_(), c]


def _results(outs: Any, module: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = torch.stack([(out.float() ** 2).sum() for out in outs]).sum()
    leaves = [*tensors[:2], *module.parameters()]
    return [*outs, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("tokens", [0, 1, 8, 20])
def test_gradients_are_those_of_the_whole(tokens: int) -> None:
    module, tensors = _make(tokens)
    want = _results(_Part()(module, *tensors), module, tensors)
    for tile in TILES:
        part = _Part()
        got = _results(run_in_tiles(part, module, NAMES, tile, tensors, 2), module, tensors)
        for index, (a, b) in enumerate(zip(want, got, strict=True)):
            assert_close(f"{tile} {index}", a, b, 1e-12)
        assert max(part.rows) <= tile
        assert sum(part.rows) == 2 * tokens


def test_a_single_output_and_no_gradient() -> None:
    module, tensors = _make(20)

    def part(module: Any, x: Any, *_: Any) -> torch.Tensor:
        return module(x)

    out = run_in_tiles(part, module, NAMES, 8, tensors, 1)
    assert_close("out", module(tensors[0]), out, 1e-12)
    with torch.no_grad():
        assert torch.equal(run_in_tiles(part, module, NAMES, 8, tensors, 1), out)
    module.weight.requires_grad_(False)
    run_in_tiles(part, module, NAMES, 8, tensors, 1).sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad is not None


def test_hooks_of_parameters_run_once() -> None:
    module, tensors = _make(20)
    calls: list[int] = []
    module.weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    outs = run_in_tiles(_Part(), module, NAMES, 4, tensors, 2)
    (outs[0].sum() + outs[1].sum()).backward()
    assert calls == [1]


def test_only_inputs_are_saved() -> None:
    module, tensors = _make(20)
    saved: list[tuple[int, ...]] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run_in_tiles(_Part(), module, NAMES, 4, tensors, 2)
    assert saved == [tuple(x.shape) for x in tensors]


def test_a_checkpoint_stops_before_the_last_part() -> None:
    """Nobody needs what the last part gives when a checkpoint computes again."""
    module, tensors = _make(20)
    first, last = _Part(), _Part()

    def layer(x: Any, y: Any, c: Any) -> Any:
        z = run_in_tiles(first, module, NAMES, 8, [x, y, c], 2)[1]
        return run_in_tiles(last, module, NAMES, 8, [x, z, c], 2)[0]

    layer_out = checkpoint(layer, *tensors, use_reentrant=False)
    assert isinstance(layer_out, torch.Tensor)
    layer_out.sum().backward()
    assert sum(first.rows) == 3 * 20
    assert sum(last.rows) == 2 * 20


def test_the_graph_may_run_twice() -> None:
    module, tensors = _make(20)
    loss = sum(out.sum() for out in run_in_tiles(_Part(), module, NAMES, 8, tensors, 2))
    assert isinstance(loss, torch.Tensor)
    once = torch.autograd.grad(loss, tensors[:2], retain_graph=True)
    again = torch.autograd.grad(loss, tensors[:2])
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_autocast_holds_in_the_backward_and_casts_no_stale_copy() -> None:
    """The weight is used outside of tiles too, in the same autocast region."""
    module, tensors = _make(24, torch.float32)

    def run(tile: int | None) -> tuple[list[torch.Tensor], set[torch.dtype]]:
        seen: set[torch.dtype] = set()

        def part(module: Any, x: Any, *_: Any) -> torch.Tensor:
            z = module(x)
            seen.add(z.dtype)
            return z.sin()

        with torch.autocast("cpu", torch.bfloat16):
            x = tensors[0]
            out = part(module, x) if tile is None else run_in_tiles(
                part, module, NAMES, tile, [x], 1
            )  # fmt: skip
            total = out.float().sum() + module(x).float().sum()
        return list(torch.autograd.grad(total, [x, *module.parameters()])), seen

    want, _ = run(None)
    for tile in (5, 24):
        got, seen = run(tile)
        assert seen == {torch.bfloat16}
        for a, b in zip(want, got, strict=True):
            assert a.dtype == b.dtype
            assert rel_error(a, b) < 5e-3


def test_sums_of_16_bit_gradients_are_wide() -> None:
    """2048 equal tiles: added up in bfloat16 they would stop growing at 256."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    x = torch.ones(1, 2048, 1, dtype=torch.bfloat16)

    def part(module: Any, x: Any) -> torch.Tensor:
        return module(x)

    run_in_tiles(part, module, ("weight",), 1, [x], 1).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.item() == 2048

"""How the band kernel's programs are started: what the launcher of triton is given."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ringattn.kernels import triton_launch
from tests.closeness import assert_close
from tests.kernels.problems import OPEN, problem, run_kernel, tile_table
from tests.kernels.triton_kernels import ALLOWED, band_kernel


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every launch; the kernels run as ever."""
    recorded: list[tuple[Any, ...]] = []
    original = triton_launch.kernel

    class Recorder:
        def __init__(self, part: Any) -> None:
            self.function = original(part)

        def __getitem__(self, grid: Any) -> Any:
            def start(*arguments: Any, **constants: Any) -> None:
                recorded.append(arguments)
                self.function[grid](*arguments, **constants)

            return start

    interpreted = triton_launch.interpreted()
    monkeypatch.setattr(triton_launch, "interpreted", lambda: interpreted)
    monkeypatch.setattr(triton_launch, "kernel", Recorder)
    return recorded


def _within(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _within(part)
    else:
        yield value


def test_descriptors_are_arguments_of_their_own(
    generator: torch.Generator, calls: list[tuple[Any, ...]]
) -> None:
    """The launcher expands no descriptor that lies in a tuple, and then fails an assertion."""
    tiles = tile_table((0, 4, 0, 40, 0, 40, -OPEN, 0, 1))
    p = problem(tiles, generator, rows=40, keys=40, dtype=torch.float32)
    run_kernel(band_kernel("deterministic tma"), p, [tiles])
    assert len(calls) == 3  # forward, keys_only, queries
    for arguments in calls:
        assert sum(isinstance(a, TensorDescriptor) for a in arguments) == 2
        nested = [a for a in arguments if isinstance(a, tuple)]
        assert not any(isinstance(part, TensorDescriptor) for part in _within(tuple(nested)))


@pytest.mark.parametrize("heads", [(4, 2), (1, 1)], ids=str)
def test_one_compiled_kernel_takes_every_length(
    generator: torch.Generator, calls: list[tuple[Any, ...]], heads: tuple[int, int]
) -> None:
    """Triton compiles anew where an integer becomes 1 or a multiple of 16, or ceases to be one."""
    classes = []
    for rows in (48, 47, 46):
        calls.clear()
        tiles = tile_table((0, heads[0], 0, rows, 0, rows, -OPEN, 0, 1))
        p = problem(tiles, generator, rows=rows, keys=rows, heads=heads, dtype=torch.float32)
        run_kernel(band_kernel("deterministic"), p, [tiles])
        numbers = [[n for n in _within(arguments) if isinstance(n, int)] for arguments in calls]
        classes.append([[(n == 1, n % 16 == 0) for n in of_call] for of_call in numbers])
    assert classes == [classes[0]] * 3


def test_expanded_tensors_travel_without_descriptors(
    generator: torch.Generator, calls: list[tuple[Any, ...]]
) -> None:
    """A mean over tokens gives a gradient whose rows are one place in memory."""
    tiles = tile_table((0, 4, 0, 40, 0, 40, -OPEN, 0, 1))
    p = problem(tiles, generator, rows=40, keys=40, dtype=torch.float32)
    p = replace(p, dout=p.dout[:, :1].expand(-1, 40, -1, -1))
    reference = p.reference()
    for field, got in run_kernel(band_kernel("tma"), p, [tiles]).items():
        assert_close(field, getattr(reference, field), got, ALLOWED[torch.float32])
    forward, keys = ([isinstance(a, TensorDescriptor) for a in given] for given in calls)
    assert any(forward)
    assert not any(keys)

"""Adapters of windowed flash ops, run whole over a stand-in op that has the real ops' quirks."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from ringattn.kernels.base import Kernel
from ringattn.kernels.flash import FlashKernel
from tests.closeness import assert_close
from tests.kernels.flash_stand_in import StandInFlash
from tests.kernels.problems import (
    OPEN,
    Problem,
    problem,
    random_tiles,
    run_kernel,
    tile_table,
)
from tests.kernels.test_kernels import BANDS

EXACT = 1e-11
SHAPES = {
    **BANDS,
    "tall window": [(0, 4, 0, 300, 0, 40, -OPEN, 5, 1)],
    "tall window, both edges": [(0, 4, 0, 300, 0, 90, -250, -30, 1)],
    "tall, left edge": [(0, 4, 0, 300, 0, 90, -250, OPEN, 1)],
    "one row": [(0, 4, 7, 8, 0, 90, -OPEN, OPEN, 1)],
    "single rows": [(0, 4, i, i + 1, 2 * i, 2 * i + 2, -OPEN, OPEN, 1) for i in range(9)],
    "single rows, keys left out": [
        (0, 4, i, i + 1, 3 * i, 3 * i + 2, -OPEN, OPEN, 1) for i in range(9)
    ],
    "windowed documents": [
        (0, 4, s, t, s, t, -40, 0, 1) for s, t in pairwise((0, 150, 170, 300, 301))
    ],
    "documents with gaps": [
        (0, 4, 10, 60, 0, 50, -OPEN, -10, 1),
        (0, 4, 60, 120, 55, 130, -OPEN, OPEN, 1),
        (0, 4, 125, 160, 130, 165, -OPEN, 5, 1),
    ],
    "gaps bridged": [
        (0, 4, 10, 60, 0, 50, -OPEN, -10, 1),
        (0, 4, 70, 120, 55, 130, -OPEN, 10, 1),
        (0, 4, 120, 160, 131, 165, -OPEN, 5, 1),
    ],
    "not tight": [(0, 4, 0, 200, 0, 100, -OPEN, -50, 1), (0, 2, 200, 210, 0, 50, 0, OPEN, 1)],
}


def _tiles(name: str) -> np.ndarray:
    return tile_table(*SHAPES[name])


def _check(kernel: Kernel, p: Problem, parts: list[np.ndarray], rel: float = EXACT) -> None:
    reference = p.reference()
    for name, got in run_kernel(kernel, p, parts).items():
        assert_close(name, getattr(reference, name), got, rel)


@pytest.fixture
def kernel() -> Kernel:
    return FlashKernel(StandInFlash())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_band_shapes(kernel: Kernel, generator: torch.Generator, name: str, batch: int) -> None:
    tiles = _tiles(name)
    rows, keys = int(tiles["q1"].max()), int(tiles["k1"].max())
    _check(kernel, problem(tiles, generator, rows=rows, keys=keys, batch=batch), [tiles])


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)], ids=["G1", "G4", "G2"])
def test_random_tiles_in_two_launches(
    kernel: Kernel, generator: torch.Generator, seed: int, step: int, heads: tuple[int, int]
) -> None:
    random = np.random.default_rng(seed)
    for size in ((37, 61), (61, 37), (150, 133)):
        for _ in range(4):
            tiles = random_tiles(random, heads[0], *size, steps=(1, step))
            p = problem(tiles, generator, rows=size[0], keys=size[1], heads=heads)
            random.shuffle(tiles)
            cut = int(random.integers(0, len(tiles) + 1))
            _check(kernel, p, [tiles[:cut], tiles[cut:]])


@pytest.mark.parametrize("name", ["documents", "windowed documents", "gaps bridged"])
def test_documents_are_one_call(generator: torch.Generator, name: str) -> None:
    tiles, op = _tiles(name), StandInFlash()
    p = problem(tiles, generator, rows=int(tiles["q1"].max()), keys=int(tiles["k1"].max()))
    _check(FlashKernel(op), p, [tiles])
    assert len(op.calls) == 1
    assert op.calls[0] is not None


def test_no_tiles_and_an_empty_batch_call_nothing(generator: torch.Generator) -> None:
    op = StandInFlash()
    p = problem(tile_table(), generator, rows=5, keys=0)
    assert torch.isneginf(run_kernel(FlashKernel(op), p, [tile_table()])["lse"]).all()
    tiles = _tiles("documents")
    p = problem(tiles, generator, rows=600, keys=600, batch=0)
    run_kernel(FlashKernel(op), p, [tiles])
    assert not op.calls


def test_rows_that_nothing_has_filled_change_nothing(
    kernel: Kernel, generator: torch.Generator
) -> None:
    """Gaps between sequences may hold anything, here NaN, also in lse and delta."""
    tiles = tile_table((0, 4, 0, 50, 0, 50, -OPEN, 0, 1), (0, 4, 60, 120, 70, 130, -OPEN, 10, 1))
    p = problem(tiles, generator, rows=120, keys=130)
    reference = p.reference()
    for x in (p.q, p.dout):
        x[:, 50:60] = float("nan")
    for x in (p.k, p.v):
        x[:, 50:70] = float("nan")
    prepared = kernel.prepare(tiles, torch.device("cpu"))
    lse, delta = reference.lse.clone(), (reference.out * p.dout).sum(-1)
    lse[:, 50:60] = delta[:, 50:60] = float("nan")
    grads = [torch.zeros_like(x) for x in (p.q, p.k, p.v)]
    kernel.backward(
        p.dout, p.q, p.k, p.v, lse, delta, prepared, *grads, scale=p.scale, softcap=None
    )
    for name, got in zip(("dq", "dk", "dv"), grads, strict=True):
        want, rows = getattr(reference, name), slice(50, 60 if name == "dq" else 70)
        assert_close(name, want[:, :50], got[:, :50], EXACT)
        assert_close(name, want[:, rows.stop :], got[:, rows.stop :], EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(kernel: Kernel, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Rounding of partial outputs and gradients, of the stand-in output, and nothing else."""
    tiles = _tiles("causal")
    p = problem(tiles, generator, rows=700, keys=700, head_dim=(64, 64), dtype=dtype)
    cut = [
        tile_table((0, 4, 0, 700, 0, 350, -OPEN, 0, 1)),
        tile_table((0, 4, 350, 700, 350, 700, -OPEN, 0, 1)),
    ]
    _check(kernel, p, cut, rel=3 * torch.finfo(dtype).eps)


def test_gradient_of_lse_alone(kernel: Kernel, generator: torch.Generator) -> None:
    tiles = tile_table((0, 2, 0, 80, 0, 80, -OPEN, OPEN, 1))
    p = problem(tiles, generator, rows=80, keys=80, heads=(2, 2))
    dlse = torch.randn(1, 80, 2, generator=generator, dtype=torch.float64)
    dq, dk, dv = (torch.zeros_like(x) for x in (p.q, p.k, p.v))
    prepared = kernel.prepare(tiles, torch.device("cpu"))
    lse = p.reference().lse
    kernel.backward(
        torch.zeros_like(p.dout),
        p.q,
        p.k,
        p.v,
        lse,
        -dlse,
        prepared,
        dq,
        dk,
        dv,
        scale=p.scale,
        softcap=None,
    )
    score = torch.einsum("bihd,bjhd->bhij", p.q, p.k) * p.scale
    dscore = score.softmax(-1) * dlse.permute(0, 2, 1).unsqueeze(-1)
    assert_close("dq", torch.einsum("bhij,bjhd->bihd", dscore, p.k) * p.scale, dq, EXACT)
    assert_close("dk", torch.einsum("bhij,bihd->bjhd", dscore, p.q) * p.scale, dk, EXACT)
    assert dv.abs().max() < 1e-15

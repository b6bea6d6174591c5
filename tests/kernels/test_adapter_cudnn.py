"""The cuDNN adapter, run whole over a stand-in op: cells, merging, what goes to flash."""

import numpy as np
import pytest
import torch

from ringattn.kernels import cudnn
from ringattn.kernels.cudnn import AtenCudnn, CudnnKernel, dense_tiles
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
from tests.kernels.test_adapters import SHAPES

EXACT = 1e-11


class StandInCudnn:
    """`DenseOp` over the flash stand-in: cuDNN's causal is top-left, the same on squares alone."""

    def __init__(self) -> None:
        self.shapes: list[tuple[torch.Size, torch.Size, bool]] = []

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shapes.append((q.shape, k.shape, causal))
        assert not causal or q.shape[2] == k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        window = (-1, 0) if causal else (-1, -1)
        out, lse = StandInFlash().forward(q, k, v, None, window, scale)
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert dout.stride() == out.stride(), "cuDNN's graph is kept without their strides"
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        window = (-1, 0) if causal else (-1, -1)
        lse = lse.contiguous()
        dq, dk, dv = StandInFlash().backward(dout, q, k, v, out, lse, None, window, scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _check(p: Problem, parts: list[np.ndarray]) -> StandInCudnn:
    op = StandInCudnn()
    reference = p.reference()
    got = run_kernel(CudnnKernel(op, FlashKernel(StandInFlash())), p, parts)
    for name, x in got.items():
        assert_close(name, getattr(reference, name), x, EXACT)
    return op


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "SMALLEST", 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("any_size")
def test_band_shapes(generator: torch.Generator, name: str, batch: int) -> None:
    tiles = tile_table(*SHAPES[name])
    rows, keys = int(tiles["q1"].max()), int(tiles["k1"].max())
    op = _check(problem(tiles, generator, rows=rows, keys=keys, batch=batch), [tiles])
    assert bool(op.shapes) == bool(dense_tiles(tiles).any())


@pytest.mark.parametrize("smallest", [1, 20])
@pytest.mark.parametrize("heads", [(4, 1), (6, 3)], ids=["G4", "G2"])
def test_random_tiles_in_two_launches(
    generator: torch.Generator,
    seed: int,
    heads: tuple[int, int],
    smallest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cudnn, "SMALLEST", smallest)
    random = np.random.default_rng(seed)
    for size in ((37, 61), (150, 133)):
        for _ in range(4):
            tiles = random_tiles(random, heads[0], *size, steps=(1, 2))
            p = problem(tiles, generator, rows=size[0], keys=size[1], heads=heads)
            cut = int(random.integers(0, len(tiles) + 1))
            op = _check(p, [tiles[:cut], tiles[cut:]])
            assert all(min(q[2], k[2]) >= smallest for q, k, _ in op.shapes)


def test_causal_and_full_are_one_call_each(generator: torch.Generator) -> None:
    tiles = tile_table(
        (0, 4, 0, 100, 0, 100, -OPEN, 0, 1), (0, 4, 100, 170, 0, 100, -OPEN, OPEN, 1)
    )
    op = _check(problem(tiles, generator, rows=170, keys=100), [tiles])
    assert [(q[2], k[2], causal) for q, k, causal in op.shapes] == [
        (100, 100, True),
        (70, 100, False),
    ]


def test_equal_documents_are_batched(generator: torch.Generator) -> None:
    tiles = tile_table(*[(0, 4, s, s + 70, s, s + 70, -OPEN, 0, 1) for s in range(0, 350, 70)])
    op = _check(problem(tiles, generator, rows=350, keys=350), [tiles])
    assert [(q[0], q[2]) for q, _, _ in op.shapes] == [(5, 70)]


def test_windows_go_to_flash() -> None:
    tiles = tile_table(
        (0, 4, 0, 300, 0, 300, -99, 0, 1),
        (0, 4, 300, 400, 0, 300, -OPEN, OPEN, 1),
        (0, 4, 400, 410, 0, 300, -OPEN, OPEN, 1),
        (0, 4, 500, 700, 500, 700, -OPEN, 0, 1),
    )
    assert dense_tiles(tiles).tolist() == [False, True, False, True]


def test_aten_op_takes_our_arguments() -> None:
    """Argument order and result layout, as far as PyTorch's shape functions know them."""
    q, k = (
        torch.empty(2, h, n, 64, dtype=torch.bfloat16, device="meta") for h, n in ((4, 30), (2, 40))
    )
    out, lse = AtenCudnn().forward(q, k, k, False, 0.125)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 30)
    grads = AtenCudnn().backward(out, q, k, k, out, lse, False, 0.125)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


REFUSED = [
    ({"device": "cpu"}, 90100, (9, 0), "device cpu"),
    ({"softcap": 30.0}, 90100, (9, 0), "softcap 30.0"),
    ({"head_dim": (192, 128)}, 90100, (9, 0), "(192, 128)"),
    ({}, 8906, (9, 0), "cuDNN 8906"),
    ({"head_dim": (256, 256)}, 91000, (10, 0), "above 128"),
    ({"head_dim": (256, 256)}, 90100, (9, 0), "above 128"),
    ({"head_dim": (256, 256)}, 91000, (9, 0), None),
    ({}, 90100, (8, 0), None),
]


@pytest.mark.parametrize(("changes", "version", "major", "reason"), REFUSED, ids=str)
def test_refusal(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    version: int,
    major: tuple[int, int],
    reason: str | None,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: major)
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: version)
    inputs = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": (64, 64), "softcap": None}
    got = CudnnKernel().refusal(**(inputs | changes))  # type: ignore[arg-type]
    assert got == reason if reason is None else reason in (got or "")

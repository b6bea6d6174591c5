"""The adapters over the real ops, bfloat16, against the fp64 reference; and the stand-in's quirks.

Needs a CUDA device. A kernel that refuses the machine (FA3 or FA4 not installed, say) is skipped
with its reason.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ringattn.kernels.band_windows import window_calls
from ringattn.kernels.base import Kernel
from ringattn.kernels.cudnn import CudnnKernel
from ringattn.kernels.fa3 import Fa3Kernel
from ringattn.kernels.fa4 import Fa4Kernel
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.flash_op import AtenFlash, Lengths
from ringattn.kernels.flex import FlexKernel
from tests.closeness import assert_close
from tests.kernels.flash_stand_in import StandInFlash
from tests.kernels.problems import Problem, problem, random_tiles, run_kernel, tile_table
from tests.kernels.test_adapters import SHAPES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

EPS = torch.finfo(torch.bfloat16).eps
CLOSE = {"out": EPS, "lse": 1e-4, "dq": 2 * EPS, "dk": 2 * EPS, "dv": 2 * EPS}
WINDOWED = {"flash": FlashKernel, "cudnn": CudnnKernel, "fa3": Fa3Kernel, "fa4": Fa4Kernel}
FLEX_SHAPES = ["causal", "window, two-sided, cut", "strided", "heads across groups", "gaps bridged"]
"""Each costs the compilation of two graphs per mask."""


def _usable(kernel: Kernel, head_dim: int) -> Kernel:
    reason = kernel.refusal(
        device="cuda", dtype=torch.bfloat16, head_dim=(head_dim, head_dim), softcap=None
    )
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")
    return kernel


def _on_gpu(p: Problem) -> Problem:
    q, k, v, dout, allowed = (x.cuda() for x in (p.q, p.k, p.v, p.dout, p.allowed))
    return replace(p, q=q, k=k, v=v, dout=dout, allowed=allowed)


def _check(kernel: Kernel, p: Problem, parts: list[np.ndarray]) -> None:
    p = _on_gpu(p)
    reference = p.reference()
    for name, got in run_kernel(kernel, p, parts).items():
        assert_close(name, getattr(reference, name), got, CLOSE[name])


def _problem(name: str, generator: torch.Generator, head_dim: int, batch: int = 1) -> Problem:
    tiles = tile_table(*SHAPES[name])
    return problem(
        tiles,
        generator,
        rows=int(tiles["q1"].max()),
        keys=int(tiles["k1"].max()),
        head_dim=(head_dim, head_dim),
        batch=batch,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kernel_name", WINDOWED)
def test_band_shapes(
    generator: torch.Generator, kernel_name: str, name: str, head_dim: int
) -> None:
    kernel = _usable(WINDOWED[kernel_name](), head_dim)
    p = _problem(name, generator, head_dim, batch=1 + (head_dim == 64))
    _check(kernel, p, [p.tiles])


@pytest.mark.parametrize("name", FLEX_SHAPES)
def test_band_shapes_flex(generator: torch.Generator, name: str) -> None:
    kernel = _usable(FlexKernel(), 64)
    p = _problem(name, generator, 64)
    _check(kernel, p, [p.tiles])


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)], ids=["G1", "G4", "G2"])
@pytest.mark.parametrize("kernel_name", WINDOWED)
def test_random_tiles_in_two_launches(
    generator: torch.Generator, seed: int, kernel_name: str, heads: tuple[int, int]
) -> None:
    kernel = _usable(WINDOWED[kernel_name](), 64)
    random = np.random.default_rng(seed)
    for rows, keys in ((37, 61), (61, 37), (290, 333), (700, 513)):
        for _ in range(4):
            tiles = random_tiles(random, heads[0], rows, keys, steps=(1, 2))
            p = problem(
                tiles,
                generator,
                rows=rows,
                keys=keys,
                heads=heads,
                head_dim=(64, 64),
                dtype=torch.bfloat16,
            )
            cut = int(random.integers(0, len(tiles) + 1))
            _check(kernel, p, [tiles[:cut], tiles[cut:]])


def test_flex_in_two_launches_with_softcap_and_unequal_head_dims(
    generator: torch.Generator,
) -> None:
    kernel = _usable(FlexKernel(), 64)
    parts = [
        tile_table((0, 4, 0, 500, 0, 250, -400, 0, 1)),
        tile_table((0, 4, 250, 500, 250, 500, -400, 0, 1)),
    ]
    p = problem(
        np.concatenate(parts),
        generator,
        rows=500,
        keys=500,
        head_dim=(128, 64),
        dtype=torch.bfloat16,
        softcap=5.0,
    )
    _check(kernel, p, parts)


@pytest.mark.parametrize("name", SHAPES)
def test_stand_in_is_the_op(generator: torch.Generator, name: str) -> None:
    """What the CPU tests inject computes what the op computes, rows without keys included."""
    _usable(FlashKernel(), 64)
    p = _problem(name, generator, 64)
    for call in window_calls(p.tiles):
        q, dout = (x[0, call.rows, :2].contiguous() for x in (p.q, p.dout))
        k, v = (x[0, call.keys, :1].contiguous() for x in (p.k, p.v))
        q_starts, k_starts = (torch.tensor(s, dtype=torch.int32) for s in call.starts)
        lengths = Lengths(q_starts, k_starts, *call.longest)
        there = Lengths(q_starts.cuda(), k_starts.cuda(), *call.longest)
        window = (call.left, call.right)
        want_out, want_lse = StandInFlash().forward(q, k, v, lengths, window, p.scale)
        do, qg, kg, vg = (x.cuda() for x in (dout, q, k, v))
        out, lse = AtenFlash().forward(qg, kg, vg, there, window, p.scale)
        assert_close("out", want_out, out, EPS)
        assert_close("lse", want_lse, lse, 1e-4)
        want = StandInFlash().backward(dout, q, k, v, want_out, want_lse, lengths, window, p.scale)
        got = AtenFlash().backward(do, qg, kg, vg, out, lse, there, window, p.scale)
        for which, x, y in zip(("dq", "dk", "dv"), want, got, strict=True):
            assert_close(which, x, y, 2 * EPS)


def test_gradient_of_lse_alone(generator: torch.Generator) -> None:
    kernel = _usable(FlashKernel(), 64)
    p = _on_gpu(_problem("documents", generator, 64))
    dlse = torch.randn(p.q.shape[:3], generator=generator).cuda()
    lse = p.reference().lse.float()
    q, k = (x.double() for x in (p.q, p.k.repeat_interleave(2, dim=2)))
    score = torch.einsum("bihd,bjhd->bhij", q, k) * p.scale
    prob = score.masked_fill(~p.allowed, float("-inf")).softmax(-1)
    dscore = prob * dlse.double().permute(0, 2, 1).unsqueeze(-1) * p.scale
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (p.q, p.k, p.v)]
    kernel.backward(
        torch.zeros_like(p.dout),
        p.q,
        p.k,
        p.v,
        lse,
        -dlse,
        kernel.prepare(p.tiles, p.q.device),
        *grads,
        scale=p.scale,
        softcap=None,
    )
    assert_close("dq", torch.einsum("bhij,bjhd->bihd", dscore, k), grads[0], 2 * EPS)
    dk = torch.einsum("bhij,bihd->bjhd", dscore, q).unflatten(2, (2, 2)).sum(3)
    assert_close("dk", dk, grads[1], 2 * EPS)
    assert grads[2].abs().max() < 1e-9

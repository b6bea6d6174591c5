"""The Triton band kernel in the interpreter, against the float64 reference: out, lse, dq, dk, dv.

Blocks are small, so that small problems fall into many. Plans of every mask run in
`tests/core/test_triton_plans.py`.
"""

import importlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ringattn.errors import UserError
from ringattn.kernels import kernel_by_name
from ringattn.kernels.triton_band import TritonBandKernel
from ringattn.kernels.triton_configs import BlockConfig, block_config
from tests.closeness import assert_close, rel_error
from tests.kernels.problems import OPEN, problem, random_tiles, run_kernel, tile_table
from tests.kernels.triton_kernels import ALLOWED, PARTS, band_kernel

BANDS = {
    "causal": [(0, 4, 0, 70, 0, 70, -OPEN, 0, 1)],
    "window, two-sided, cut": [
        (0, 4, 10, 41, 10, 90, -13, 22, 1),
        (0, 4, 41, 85, 28, 90, -13, 22, 1),
    ],
    "upper triangle": [(0, 4, 0, 60, 0, 60, 0, OPEN, 1)],
    "strided": [(0, 2, 0, 69, 1, 70, -33, 20, 2), (2, 4, 1, 68, 2, 69, -50, OPEN, 3)],
    "two steps on the same rows": [
        (0, 4, 0, 50, 0, 20, -OPEN, OPEN, 1),
        (0, 4, 1, 50, 21, 60, -OPEN, OPEN, 2),
    ],
    "heads across groups": [
        (0, 3, 0, 50, 0, 50, -OPEN, 0, 1),
        (3, 4, 20, 70, 0, 40, -OPEN, OPEN, 1),
    ],
    "inside a group": [(1, 2, 0, 40, 0, 40, -OPEN, OPEN, 1)],
    "overlapping keys": [(0, 4, s, s + 20, s, s + 50, -OPEN, OPEN, 1) for s in (0, 20, 40)],
    "short runs": [
        (0, 4, r, r + 16, c, c + 8, -OPEN, OPEN, 1) for r in (0, 16, 32) for c in (0, 16, 24, 40)
    ],
    "far rows": [(0, 4, 1, 640, 3, 640, -OPEN, OPEN, 311)],
}

HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (80, 48), (192, 128), (8, 1)]


def _by_turns(cases: Iterable[tuple[Any, ...]], short: Callable[[int], bool]) -> list[Any]:
    """The cases, by number, of which only some are in the short tests."""
    return [
        pytest.param(*case, marks=() if short(index) else pytest.mark.full)
        for index, case in enumerate(cases)
    ]


# Each shape with two variants that differ in both of what a variant is made of.
@pytest.mark.parametrize(
    "name, variant",
    _by_turns(
        itertools.product(BANDS, ["pointers", "tma", "deterministic", "deterministic tma"]),
        lambda index: (index // 4 % 2 == 0) == (index % 4 in (0, 3)),
    ),
)
def test_band_shapes(generator: torch.Generator, name: str, variant: str) -> None:
    tiles = tile_table(*BANDS[name])
    rows, keys = int(tiles["q1"].max()), int(tiles["k1"].max())
    p = problem(tiles, generator, rows=rows, keys=keys, batch=2, dtype=torch.float32)
    reference = p.reference()
    for field, got in run_kernel(band_kernel(variant), p, [tiles]).items():
        assert_close(field, getattr(reference, field), got, ALLOWED[torch.float32])


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)], ids=["G1", "G4", "G2"])
@pytest.mark.parametrize("variant", ["tma", "deterministic"])
def test_random_bands_in_several_launches(
    generator: torch.Generator, seed: int, heads: tuple[int, int], variant: str
) -> None:
    random = np.random.default_rng(seed)
    for _ in range(2):
        tiles = random_tiles(random, heads[0], 57, 71, steps=(1, 2))
        p = problem(tiles, generator, rows=57, keys=71, heads=heads, dtype=torch.float32)
        random.shuffle(tiles)
        cut = int(random.integers(0, len(tiles) + 1))
        reference = p.reference()
        got = run_kernel(band_kernel(variant), p, [tiles[:cut], tiles[cut:]])
        for field, value in got.items():
            assert_close(field, getattr(reference, field), value, ALLOWED[torch.float32])


@pytest.mark.parametrize(
    "dtype, head_dim, softcap",
    _by_turns(
        itertools.product(ALLOWED, HEAD_DIMS, [None, 3.0]),
        lambda index: index % 2 == (index // 2 + index // (2 * len(HEAD_DIMS))) % 2,
    ),
    ids=str,
)
def test_dtypes_and_head_dims(
    generator: torch.Generator,
    dtype: torch.dtype,
    head_dim: tuple[int, int],
    softcap: float | None,
) -> None:
    tiles = tile_table((0, 4, 0, 40, 5, 50, -25, 8, 1))
    p = problem(tiles, generator, rows=40, keys=50, head_dim=head_dim, softcap=softcap, dtype=dtype)
    reference = p.reference()
    for variant in ("pointers", "deterministic tma"):
        for field, got in run_kernel(band_kernel(variant), p, [tiles]).items():
            assert_close(field, getattr(reference, field), got, ALLOWED[dtype])


@pytest.mark.parametrize("scale", [-0.7, 1e-3, 20.0])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_scales_of_any_size(
    generator: torch.Generator, scale: float, softcap: float | None
) -> None:
    tiles = tile_table((0, 4, 0, 40, 0, 40, -OPEN, 3, 1))
    p = problem(tiles, generator, rows=40, keys=40, softcap=softcap, dtype=torch.float32)
    p = replace(p, scale=scale)
    reference = p.reference()
    for field, got in run_kernel(band_kernel("deterministic"), p, [tiles]).items():
        assert_close(field, getattr(reference, field), got, 5e-5)


def test_a_scale_of_zero_is_refused(generator: torch.Generator) -> None:
    tiles = tile_table((0, 4, 0, 40, 0, 40, -OPEN, 3, 1))
    p = replace(problem(tiles, generator, rows=40, keys=40, dtype=torch.float32), scale=0.0)
    with pytest.raises(UserError, match="other than 0"):
        run_kernel(band_kernel("pointers"), p, [tiles])


def test_no_tiles_change_nothing(generator: torch.Generator) -> None:
    p = problem(tile_table(), generator, rows=5, keys=3, dtype=torch.float32)
    got = run_kernel(band_kernel("pointers"), p, [tile_table()])
    assert torch.isneginf(got["lse"]).all()
    assert all(not got[name].any() for name in ("out", "dq", "dk", "dv"))


def test_wrong_delta_is_noticed(generator: torch.Generator) -> None:
    """A partial delta instead of the global one must change dq: the tests above can fail."""
    tiles = tile_table((0, 4, 0, 40, 0, 40, -OPEN, 0, 1))
    p = problem(tiles, generator, rows=40, keys=40, dtype=torch.float32)
    reference = p.reference()
    kernel = band_kernel("pointers")
    prepared = kernel.prepare(tiles, torch.device("cpu"))
    grads = [torch.zeros_like(x) for x in (p.q, p.k, p.v)]
    delta = 0.5 * (reference.out * p.dout).sum(-1).float()
    lse = reference.lse.float()
    kernel.backward(
        p.dout, p.q, p.k, p.v, lse, delta, prepared, *grads, scale=p.scale, softcap=None
    )
    assert reference.dq is not None
    assert rel_error(reference.dq, grads[0]) > 1e-2


@pytest.mark.parametrize("module, field", [("forward", "out"), ("backward", "dk")])
def test_a_wrong_edge_is_noticed(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, module: str, field: str
) -> None:
    """A block taken for wholly inside its band, though columns stick out, must be seen."""
    parts: Any = importlib.import_module(f"ringattn.kernels.triton_{module}")
    tiles = tile_table((0, 4, 0, 64, 0, 64, -30, 0, 1))
    p = problem(tiles, generator, rows=64, keys=64, dtype=torch.float32)
    bounds = parts.run_bounds

    def wider(*arguments):
        first, end, full0, full1 = bounds(*arguments)
        return first, end, full0 - 16, full1 + 16

    monkeypatch.setattr(parts, "run_bounds", wider)
    got = run_kernel(band_kernel("pointers"), p, [tiles])
    assert rel_error(getattr(p.reference(), field), got[field]) > 1e-3


@pytest.mark.parametrize(
    "inputs, reason",
    [
        ({"dtype": torch.float64}, "dtype torch.float64 is none of"),
        ({"head_dim": (320, 64)}, "are not between 1 and 256"),
        ({"head_dim": (192, 128), "dtype": torch.float32}, "are not between 1 and 128"),
        ({"device": "xpu"}, "is not a CUDA GPU"),
    ],
)
def test_refusals(inputs: dict, reason: str) -> None:
    asked = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": (64, 64), "softcap": None}
    refusal = TritonBandKernel().refusal(**(asked | inputs))
    assert refusal is not None
    assert reason in refusal
    assert TritonBandKernel().refusal(**asked) is None


def test_the_shipped_table_is_whole() -> None:
    """Every architecture has every kernel, head dim and dtype; an unknown one has the default."""
    dims = ((1, 2), (64, 4), (65, 2), (128, 4), (192, 2), (256, 2))
    for arch in ("sm_80", "sm_90", "sm_100", "sm_75"):
        for part, (dim, itemsize), softcap in itertools.product(PARTS, dims, (False, True)):
            made = block_config(arch, part, dim, itemsize, softcap=softcap)
            assert isinstance(made, BlockConfig)
            assert min(made.rows, made.columns) >= 16
            assert not (made.tma and arch in ("sm_80", "sm_75"))


def test_the_kernel_has_its_name() -> None:
    assert kernel_by_name("triton").name == "triton"

"""The Triton band kernel compiled, on a GPU, against the float64 reference.

Needs a CUDA device and TRITON_INTERPRET=0: under 1 the kernels are interpreted, as
`test_triton_band.py` does on any machine. Block sizes are the shipped ones.
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.kernels.measured import architecture_of
from ringattn.kernels.triton_band import TritonBandKernel
from ringattn.kernels.triton_configs import BlockConfig, Part, block_config
from tests.closeness import assert_close, rel_error
from tests.core.cases import MASKS, Case, Inputs, fits_heads, inputs_of, mask_of, plan_of
from tests.core.exactness import relative_errors, same_bits
from tests.core.product import ALLOWED_EPS
from tests.kernels.problems import OPEN, Problem, problem, random_tiles, run_kernel, tile_table
from tests.kernels.test_kernels import BANDS as OTHER_BANDS
from tests.kernels.test_triton_band import BANDS
from tests.kernels.triton_kernels import ALLOWED, PARTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: set it to 0"
    ),
]

CLOSE = {**ALLOWED, torch.float32: 1e-5}
"""Products of float32 are three of TF32 parts, a little less than float32's own."""

VARIANTS = ["pointers", "tma", "deterministic", "deterministic tma"]
SHAPES = {**{f"other: {name}": tiles for name, tiles in OTHER_BANDS.items()}, **BANDS}
LARGE = {
    "causal": [(0, 4, 0, 777, 0, 777, -OPEN, 0, 1)],
    "window": [(0, 4, 0, 900, 0, 900, -130, 40, 1)],
    "documents": [(0, 4, a, b, a, b, -OPEN, 0, 1) for a, b in ((0, 300), (300, 301), (301, 800))],
    "listed blocks": [
        (0, 4, r, r + 64, c, c + 64, -OPEN, OPEN, 1)
        for r in range(0, 768, 64)
        for c in range(r % 192, 768, 192)
    ],
}


def _kernel(
    variant: str, dtype: torch.dtype, head_dim: int, softcap: float | None = None
) -> TritonBandKernel:
    """The shipped block sizes, with TMA where the variant says so and the device has it."""
    arch = architecture_of(torch.device("cuda"))
    tma = "tma" in variant.split() and torch.cuda.get_device_capability()[0] >= 9

    def config(part: Part) -> BlockConfig:
        made = block_config(arch, part, head_dim, dtype.itemsize, softcap=softcap is not None)
        return made if made.tma == tma else _fitting(replace(made, tma=tma), head_dim)

    return TritonBandKernel({part: config(part) for part in PARTS}, "deterministic" in variant)


def _fitting(config: BlockConfig, head_dim: int) -> BlockConfig:
    """Small enough to compile either way, where the shipped sizes were chosen for one."""
    columns = min(config.columns, 32 if head_dim > 128 else 64)
    return replace(config, rows=min(config.rows, 64), columns=columns, stages=1)


def _on_gpu(p: Problem) -> Problem:
    q, k, v, dout, allowed = (x.cuda() for x in (p.q, p.k, p.v, p.dout, p.allowed))
    return replace(p, q=q, k=k, v=v, dout=dout, allowed=allowed)


def _check(kernel: TritonBandKernel, p: Problem, parts: list[np.ndarray]) -> None:
    p = _on_gpu(p)
    reference = p.reference()
    for name, got in run_kernel(kernel, p, parts).items():
        assert_close(name, getattr(reference, name), got, CLOSE[p.q.dtype])


def _of_tiles(tiles: np.ndarray, generator: torch.Generator, **options: Any) -> Problem:
    rows, keys = int(tiles["q1"].max()), int(tiles["k1"].max())
    return problem(tiles, generator, rows=rows, keys=keys, **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LARGE)
def test_large_bands(generator: torch.Generator, name: str, variant: str) -> None:
    dtype = torch.bfloat16
    p = _of_tiles(tile_table(*LARGE[name]), generator, head_dim=(128, 128), dtype=dtype)
    _check(_kernel(variant, dtype, 128), p, [p.tiles])


@pytest.mark.parametrize("variant", ["pointers", "deterministic tma"])
@pytest.mark.parametrize("name", SHAPES)
def test_band_shapes(generator: torch.Generator, name: str, variant: str) -> None:
    dtype = torch.bfloat16
    p = _of_tiles(tile_table(*SHAPES[name]), generator, head_dim=(64, 64), batch=2, dtype=dtype)
    _check(_kernel(variant, dtype, 64), p, [p.tiles])


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)], ids=["G1", "G4", "G2"])
@pytest.mark.parametrize("variant", ["tma", "deterministic"])
def test_random_bands_in_several_launches(
    generator: torch.Generator, seed: int, heads: tuple[int, int], variant: str
) -> None:
    random = np.random.default_rng(seed)
    for rows, keys in ((57, 71), (700, 513), (290, 333)):
        for _ in range(3):
            tiles = random_tiles(random, heads[0], rows, keys, steps=(1, 2))
            p = problem(
                tiles, generator, rows=rows, keys=keys, heads=heads, head_dim=(64, 64),
                dtype=torch.bfloat16,
            )  # fmt: skip
            random.shuffle(tiles)
            cuts = sorted(random.integers(0, len(tiles) + 1, 2).tolist())
            _check(_kernel(variant, torch.bfloat16, 64), p, np.split(tiles, cuts))


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize(
    "head_dim", [(64, 64), (128, 128), (256, 256), (192, 128), (80, 48), (8, 1)], ids=str
)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_dtypes_and_head_dims(
    generator: torch.Generator,
    dtype: torch.dtype,
    head_dim: tuple[int, int],
    softcap: float | None,
) -> None:
    if dtype == torch.float32 and max(head_dim) > 128:
        pytest.skip("float32 heads have at most 128 dims")
    tiles = tile_table((0, 4, 0, 300, 5, 400, -170, 60, 1))
    p = _of_tiles(tiles, generator, head_dim=head_dim, softcap=softcap, dtype=dtype)
    _check(TritonBandKernel(deterministic=False), p, [tiles])
    _check(TritonBandKernel(deterministic=True), p, [tiles])


@pytest.mark.parametrize("variant", ["deterministic", "deterministic tma"])
def test_deterministic_gradients_repeat_bit_by_bit(
    generator: torch.Generator, variant: str
) -> None:
    tiles = tile_table(*LARGE["causal"])
    p = _on_gpu(_of_tiles(tiles, generator, head_dim=(64, 64), batch=2, dtype=torch.bfloat16))
    kernel = _kernel(variant, torch.bfloat16, 64)
    first = run_kernel(kernel, p, [tiles])
    for _ in range(3):
        assert all(torch.equal(first[n], x) for n, x in run_kernel(kernel, p, [tiles]).items())


def test_a_wrong_band_is_noticed(generator: torch.Generator) -> None:
    """One more key per row than the reference allows: the tests above can fail."""
    p = _on_gpu(_of_tiles(tile_table(*LARGE["window"]), generator, head_dim=(64, 64),
                          dtype=torch.bfloat16))  # fmt: skip
    wider = p.tiles.copy()
    wider["hi"] += 1
    got = run_kernel(_kernel("pointers", torch.bfloat16, 64), p, [wider])
    assert rel_error(p.reference().out, got["out"]) > 2 * CLOSE[torch.bfloat16]


def _simulated(mask: str, heads: str, precision: str) -> tuple[ra.Simulated, Any]:
    """A plan of three ranks over tensors on the GPU, and the reference's results."""
    case: Case = {
        "mask": mask, "layout": "striped", "method": "ring", "world": 3, "node": 1,
        "heads": heads, "batch": 2, "kernel": "triton", "precision": precision,
    }  # fmt: skip
    if not fits_heads(case):
        pytest.skip(f"the mask has no head groups for {heads}")
    dtype = getattr(torch, precision)
    x = inputs_of(case)
    cast = Inputs(*(t.to(dtype) for t in x.tensors), sinks=None, softcap=None)
    want = ra.reference(*cast.tensors[:3], mask_of(mask), cast.dout)
    plan = plan_of(case, dtype=dtype)
    return ra.simulate(plan, *(t.cuda() for t in cast.tensors)), want


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("mask", MASKS)
def test_plans_of_every_mask(mask: str, precision: str) -> None:
    """Block matrices and blocks chosen at run time among them; partial results go between hops."""
    got, want = _simulated(mask, "4:1" if precision == "bfloat16" else "8:2", precision)
    bar = ALLOWED_EPS[precision] * torch.finfo(getattr(torch, precision)).eps
    bar *= 8 if precision == "float32" else 1  # TF32 parts
    wrong = {name: e for name, e in relative_errors(got, want).items() if not e <= bar}
    assert not wrong, f"relative errors above {bar:.1e}: {wrong}"


def test_a_deterministic_plan_repeats_bit_by_bit() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (_simulated("routed_per_head", "4:1", "bfloat16")[0] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(first, second)

"""Every kernel against the fp64 reference over any tile list: out, lse, dq, dk, dv."""

import numpy as np
import pytest
import torch

from ringattn.kernels import Kernel, accumulator_dtype, kernel_by_name
from tests.closeness import assert_close, rel_error
from tests.kernels.problems import (
    NAMES,
    OPEN,
    Problem,
    problem,
    random_tiles,
    run_kernel,
    tile_table,
)

EXACT = 1e-12


@pytest.fixture(params=["matmul", "cpu_flash"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return kernel_by_name(request.param)


def _check(kernel: Kernel, p: Problem, parts: list[np.ndarray], rel: float = EXACT) -> None:
    reference = p.reference()
    for name, got in run_kernel(kernel, p, parts).items():
        assert_close(name, getattr(reference, name), got, rel)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)], ids=["G1", "G4", "G2"])
@pytest.mark.parametrize("size", [(37, 61), (290, 333)], ids=["small", "large"])
def test_random_bands(
    kernel: Kernel,
    generator: torch.Generator,
    seed: int,
    step: int,
    heads: tuple[int, int],
    size: tuple[int, int],
) -> None:
    random = np.random.default_rng(seed)
    for _ in range(4):
        tiles = random_tiles(random, heads[0], *size, steps=(1, step))
        p = problem(tiles, generator, rows=size[0], keys=size[1], heads=heads)
        random.shuffle(tiles)
        cut = int(random.integers(0, len(tiles) + 1))
        _check(kernel, p, [tiles[:cut], tiles[cut:]])


BANDS = {
    "causal": [(0, 4, 0, 700, 0, 700, -OPEN, 0, 1)],
    "causal, few extra rows": [(0, 4, 0, 700, 3, 515, -OPEN, 1, 1)],
    "window": [(0, 4, 0, 900, 0, 900, -299, 0, 1)],
    "window, two-sided, cut": [
        (0, 4, 10, 401, 100, 900, -130, 220, 1),
        (0, 4, 401, 850, 271, 900, -130, 220, 1),
    ],
    "thin window": [(0, 4, 0, 500, 0, 500, -20, 13, 1)],
    "upper triangle": [(0, 4, 0, 400, 0, 400, 0, OPEN, 1)],
    "strided": [(0, 2, 0, 699, 1, 700, -330, 20, 2), (2, 4, 1, 698, 2, 699, -100, OPEN, 3)],
    "documents": [(0, 4, s, s + 150, s, s + 150, -OPEN, 0, 1) for s in (0, 150, 300, 450)],
    "heads across groups": [
        (0, 3, 0, 200, 0, 200, -OPEN, 0, 1),
        (3, 4, 100, 300, 0, 100, -OPEN, OPEN, 1),
    ],
    "inside a group": [(1, 2, 0, 200, 0, 200, -OPEN, OPEN, 1)],
    "overlapping keys": [(0, 4, s, s + 64, s, s + 200, -OPEN, OPEN, 1) for s in (0, 64, 128)],
    "tall": [(0, 2, 0, 3100, 0, 300, -OPEN, OPEN, 1)],
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", BANDS)
def test_band_shapes(kernel: Kernel, generator: torch.Generator, name: str, batch: int) -> None:
    tiles = tile_table(*BANDS[name])
    p = problem(
        tiles, generator, rows=int(tiles["q1"].max()), keys=int(tiles["k1"].max()), batch=batch
    )
    _check(kernel, p, [tiles])


@pytest.mark.parametrize("turned", [False, True], ids=["in order", "in reverse"])
def test_launches_accumulate_in_any_order(
    kernel: Kernel, generator: torch.Generator, turned: bool
) -> None:
    chunk = 96
    tiles = tile_table(
        (0, 4, 0, chunk, 0, chunk, -OPEN, 0, 1),
        (0, 4, chunk, 2 * chunk, 0, chunk, -OPEN, OPEN, 1),
        (0, 4, chunk, 2 * chunk, chunk, 2 * chunk, -OPEN, 0, 1),
    )
    p = problem(tiles, generator, rows=2 * chunk, keys=2 * chunk)
    parts = [tiles[i : i + 1] for i in range(3)]
    _check(kernel, p, parts[::-1] if turned else parts)


def test_no_tiles_change_nothing(kernel: Kernel, generator: torch.Generator) -> None:
    p = problem(tile_table(), generator, rows=5, keys=0)
    got = run_kernel(kernel, p, [tile_table()])
    assert torch.isneginf(got["lse"]).all()
    assert all(not got[name].any() for name in NAMES if name != "lse")


def test_gradient_of_lse_alone_reaches_q_and_k(kernel: Kernel, generator: torch.Generator) -> None:
    """Rows with dout = 0 and delta != 0, for calls small and large enough for the op's backward."""
    rows = 800
    tiles = tile_table((0, 1, 0, rows, 0, rows, -OPEN, OPEN, 1))
    p = problem(tiles, generator, rows=rows, keys=rows, heads=(1, 1))
    reference = p.reference()
    prepared = kernel.prepare(tiles, torch.device("cpu"))
    dq, dk, dv = (torch.zeros_like(x) for x in (p.q, p.k, p.v))
    dlse = torch.randn(1, rows, 1, generator=generator, dtype=torch.float64)
    kernel.backward(
        torch.zeros_like(p.dout),
        p.q,
        p.k,
        p.v,
        reference.lse,
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
    assert dv.abs().max() < 1e-100


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_gradients_scale_with_dout(
    kernel: Kernel, generator: torch.Generator, magnitude: float
) -> None:
    tiles = tile_table((0, 2, 0, 800, 0, 800, -OPEN, OPEN, 1))
    p = problem(tiles, generator, rows=800, keys=800, heads=(2, 2), dtype=torch.float32)
    p = Problem(p.tiles, p.q, p.k, p.v, p.dout * magnitude, p.allowed, p.scale)
    reference, got = p.reference(), run_kernel(kernel, p, [tiles])
    for name in ("dq", "dk", "dv"):
        assert_close(name, getattr(reference, name), got[name], 1e-5)


def test_wrong_delta_is_noticed(kernel: Kernel, generator: torch.Generator) -> None:
    """A partial delta instead of the global one must change dq: the tests above can fail."""
    tiles = tile_table((0, 4, 0, 60, 0, 60, -OPEN, 0, 1))
    p = problem(tiles, generator, rows=60, keys=60)
    reference = p.reference()
    dq, dk, dv = (torch.zeros_like(x) for x in (p.q, p.k, p.v))
    prepared = kernel.prepare(tiles, torch.device("cpu"))
    delta = 0.5 * (reference.out * p.dout).sum(-1)
    kernel.backward(
        p.dout,
        p.q,
        p.k,
        p.v,
        reference.lse,
        delta,
        prepared,
        dq,
        dk,
        dv,
        scale=p.scale,
        softcap=None,
    )
    assert reference.dq is not None
    assert rel_error(reference.dq, dq) > 1e-2


@pytest.mark.parametrize("head_dim", [(24, 40), (8, 1)], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
def test_matmul_takes_softcap_and_unequal_head_dims(
    generator: torch.Generator, head_dim: tuple[int, int], softcap: float | None
) -> None:
    tiles = tile_table((0, 4, 0, 90, 5, 100, -70, 3, 1))
    p = problem(tiles, generator, rows=90, keys=100, head_dim=head_dim, softcap=softcap, batch=2)
    _check(kernel_by_name("matmul"), p, [tiles])


def test_matmul_blocks_stay_within_their_bound(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny bound the tile falls into many blocks, and the result is the same."""
    monkeypatch.setattr("ringattn.kernels.matmul.SCORES", 512)
    monkeypatch.setattr("ringattn.kernels.matmul.KEY_BLOCK", 16)
    tiles = tile_table((0, 4, 0, 90, 0, 90, -40, 3, 1))
    _check(kernel_by_name("matmul"), problem(tiles, generator, rows=90, keys=90), [tiles])


def test_cpu_flash_takes_heads_in_windows(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringattn.kernels.cpu_flash.CAST_BYTES", 1)
    tiles = tile_table((0, 5, 0, 150, 0, 150, -OPEN, 0, 1), (5, 8, 0, 150, 0, 150, -OPEN, OPEN, 1))
    p = problem(tiles, generator, rows=150, keys=150, heads=(8, 4), batch=2)
    _check(kernel_by_name("cpu_flash"), p, [tiles])


def test_strided_operands(kernel: Kernel, generator: torch.Generator) -> None:
    """Buffers may be views: here q, k, v are slices of one tensor, as after a fused projection."""
    tiles = tile_table((0, 2, 0, 140, 0, 140, -OPEN, 0, 1))
    p = problem(tiles, generator, rows=140, keys=140, heads=(2, 2))
    q, k, v = torch.stack([p.q, p.k, p.v], dim=-1).unbind(-1)
    assert q.stride(-1) == 3
    _check(kernel, Problem(tiles, q, k, v, p.dout, p.allowed, p.scale), [tiles])


def test_accumulators_have_the_documented_dtype() -> None:
    assert accumulator_dtype(torch.float64) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert accumulator_dtype(dtype) == torch.float32

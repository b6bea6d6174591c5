"""The FlexAttention adapter over the operators' dense definition: masks, blocks, lse, gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from ringattn.kernels import flex_tables as flex_tables_module
from ringattn.kernels.flex import FlexKernel
from ringattn.kernels.flex_op import CompiledFlex, EagerFlex
from ringattn.kernels.flex_tables import BLOCK, FlexTables, flex_tables
from tests.closeness import assert_close
from tests.kernels.problems import (
    OPEN,
    Problem,
    dense_mask,
    problem,
    random_tiles,
    run_kernel,
    tile_table,
)
from tests.kernels.test_adapters import SHAPES

EXACT = 1e-11


def _check(kernel: FlexKernel, p: Problem, parts: list[np.ndarray], rel: float = EXACT) -> None:
    reference = p.reference()
    for name, got in run_kernel(kernel, p, parts).items():
        assert_close(name, getattr(reference, name), got, rel)


@pytest.fixture
def kernel() -> FlexKernel:
    return FlexKernel(EagerFlex())


@pytest.mark.parametrize("name", SHAPES)
def test_band_shapes(kernel: FlexKernel, generator: torch.Generator, name: str) -> None:
    tiles = tile_table(*SHAPES[name])
    rows, keys = int(tiles["q1"].max()), int(tiles["k1"].max())
    batch = 1 + (rows < 400)
    _check(kernel, problem(tiles, generator, rows=rows, keys=keys, batch=batch), [tiles])


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)], ids=["G1", "G4", "G2"])
def test_random_tiles_in_two_launches(
    kernel: FlexKernel, generator: torch.Generator, seed: int, step: int, heads: tuple[int, int]
) -> None:
    random = np.random.default_rng(seed)
    for size in ((37, 61), (150, 133)):
        for _ in range(2):
            tiles = random_tiles(random, heads[0], *size, steps=(1, step))
            p = problem(tiles, generator, rows=size[0], keys=size[1], heads=heads)
            cut = int(random.integers(0, len(tiles) + 1))
            _check(kernel, p, [tiles[:cut], tiles[cut:]])


@pytest.mark.parametrize("slots", [1, 2])
def test_rows_with_many_intervals_take_several_masks(
    kernel: FlexKernel,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
) -> None:
    monkeypatch.setattr(flex_tables_module, "SLOTS", slots)
    rows = [(0, 4, 0, 50, s, s + 5, -OPEN, OPEN, 1) for s in (0, 10, 15, 40, 60)]
    tiles = tile_table(*rows, (0, 4, 20, 70, 70, 90, -OPEN, 30, 1))
    assert len(flex_tables(tiles)) == -(-5 // slots)
    _check(kernel, problem(tiles, generator, rows=70, keys=90), [tiles])


@pytest.mark.parametrize(
    "compiler", [lambda traced, inputs: traced, aot_eager], ids=["traced", "AOTAutograd"]
)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
def test_compiled_graphs(
    generator: torch.Generator, compiler: Callable, softcap: float | None
) -> None:
    """What Inductor is given, and what remains of it after the passes before Inductor."""
    tiles = tile_table((0, 4, 0, 90, 5, 100, -70, 3, 1), (0, 2, 90, 180, 0, 50, -OPEN, OPEN, 1))
    p = problem(tiles, generator, rows=180, keys=100, head_dim=(24, 40), softcap=softcap)
    op = CompiledFlex(compiler, dense=True)
    kernel = FlexKernel(op)
    _check(kernel, p, [tiles])
    prepared = kernel.prepare(tiles, torch.device("cpu"))
    for _ in range(2):
        kernel.forward(
            p.q, p.k, p.v, prepared, p.dout.clone(), p.q[..., 0].clone(), scale=1.0, softcap=None
        )
    assert [len(x.mask.graphs) for x in prepared.launches] == [1] * len(prepared.launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes(kernel: FlexKernel, generator: torch.Generator, dtype: torch.dtype) -> None:
    tiles = tile_table((0, 4, 0, 300, 0, 300, -200, 0, 1))
    p = problem(tiles, generator, rows=300, keys=300, head_dim=(64, 64), dtype=dtype)
    cut = [
        tile_table((0, 4, 0, 300, 0, 150, -200, 0, 1)),
        tile_table((0, 4, 150, 300, 150, 300, -200, 0, 1)),
    ]
    _check(kernel, p, cut, rel=4 * torch.finfo(dtype).eps)


def test_rows_that_nothing_has_filled_change_nothing(
    kernel: FlexKernel, generator: torch.Generator
) -> None:
    tiles = tile_table((0, 4, 0, 50, 0, 50, -OPEN, 0, 1), (0, 4, 60, 120, 70, 130, -OPEN, 10, 1))
    p = problem(tiles, generator, rows=120, keys=130)
    reference = p.reference()
    for x in (p.q, p.dout):
        x[:, 50:60] = float("nan")
    for x in (p.k, p.v):
        x[:, 50:70] = float("nan")
    for name, got in run_kernel(kernel, p, [tiles]).items():
        want, gap = getattr(reference, name), slice(50, 70 if name in ("dk", "dv") else 60)
        assert_close(name, want[:, :50], got[:, :50], EXACT)
        assert_close(name, want[:, gap.stop :], got[:, gap.stop :], EXACT)


def test_no_tiles_and_an_empty_batch(kernel: FlexKernel, generator: torch.Generator) -> None:
    p = problem(tile_table(), generator, rows=5, keys=0)
    assert torch.isneginf(run_kernel(kernel, p, [tile_table()])["lse"]).all()
    tiles = tile_table(*SHAPES["documents"])
    run_kernel(kernel, problem(tiles, generator, rows=600, keys=600, batch=0), [tiles])


def _dense(t: FlexTables, rows: int, keys: int) -> np.ndarray:
    """Pairs as a kernel sees them: all of full blocks, of partial ones what passes the test."""
    key = np.arange(len(t.keys))
    allowed = np.zeros((len(t.rows), len(t.keys)), dtype=bool)
    for slot, (start, stop) in enumerate(zip(t.start, t.stop, strict=True)):
        start, stop = (x[: len(t.rows), None] for x in (start, stop))
        step = 1 if t.step is None else t.step[slot][: len(t.rows), None]
        allowed |= (key >= start) & (key < stop) & ((key - start) % step == 0)
    row_block, key_block = np.arange(len(t.rows)) // BLOCK, key // BLOCK
    at = np.ix_(row_block, key_block)
    assert not (t.full & t.partial).any()
    seen = np.zeros((rows, keys), dtype=bool)
    seen[np.ix_(t.rows, t.keys)] = (allowed & t.partial[at]) | t.full[at]
    return seen


def _count(tiles: np.ndarray, heads: int, rows: int, keys: int) -> np.ndarray:
    count = np.zeros((heads, rows, keys), dtype=np.int64)
    for t in flex_tables(tiles):
        count[t.h0 : t.h1] += _dense(t, rows, keys)
    return count


@pytest.mark.parametrize("slots", [1, 8])
def test_tables_of_random_tiles_hold_each_pair_once(
    seed: int, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    monkeypatch.setattr(flex_tables_module, "SLOTS", slots)
    random = np.random.default_rng(seed)
    for n in range(60):
        rows, keys = (int(x) for x in random.integers(1, 70 if n < 50 else 900, 2))
        tiles = random_tiles(random, 3, rows, keys, steps=(1, 2, 3))
        expected = dense_mask(tiles, 3, rows, keys).numpy()
        assert np.array_equal(_count(tiles, 3, rows, keys), expected)


def test_inner_blocks_are_full() -> None:
    """Causal: every block below the diagonal; only the diagonal's are tested."""
    (t,) = flex_tables(tile_table((0, 4, 3, 3 + 4 * BLOCK, 0, 4 * BLOCK, -OPEN, -3, 1)))
    assert np.array_equal(t.full, np.tri(4, k=-1, dtype=bool))
    assert np.array_equal(t.partial, np.eye(4, dtype=bool))
    assert t.step is None


REFUSED = [
    ({"device": "cpu"}, "device cpu"),
    ({"dtype": torch.float64}, "float64"),
    ({"head_dim": (512, 64)}, "(512, 64)"),
    ({"head_dim": (64, 8)}, "(64, 8)"),
    ({}, None),
    ({"softcap": 30.0, "head_dim": (192, 128)}, None),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=str)
def test_refusal(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], reason: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("ringattn.kernels.flex.has_triton", lambda: True)
    inputs = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": (64, 64), "softcap": None}
    got = FlexKernel().refusal(**(inputs | changes))  # type: ignore[arg-type]
    assert got == reason if reason is None else reason in (got or "")

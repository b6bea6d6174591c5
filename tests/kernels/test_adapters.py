"""Adapters of windowed flash ops, run whole over a stand-in op that has the real ops' quirks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.attention import _fa4

from ringattn.kernels.band_windows import OPEN_WINDOW, window_calls
from ringattn.kernels.base import Kernel
from ringattn.kernels.fa3 import Fa3Kernel
from ringattn.kernels.fa4 import Fa4Kernel
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.flash_op import AtenFlash, Lengths, window_arguments
from ringattn.kernels.merge import NO_KEY
from ringattn.kernels.stand_in import device_stand_in
from tests.closeness import assert_close
from tests.kernels.flash_stand_in import StandInFlash
from tests.kernels.problems import (
    OPEN,
    Problem,
    dense_mask,
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


def _pairs(tiles: np.ndarray, heads: int, rows: int, keys: int) -> np.ndarray:
    """How often the calls of a tile list compute each pair, from the windows' definition."""
    count = np.zeros((heads, rows, keys), dtype=np.int64)
    for call in window_calls(tiles):
        i, j = np.arange(rows)[call.rows], np.arange(keys)[call.keys]
        q_starts, k_starts = call.starts
        for (a0, a1), (b0, b1) in zip(pairwise(q_starts), pairwise(k_starts), strict=True):
            distance = np.arange(b1 - b0) - np.arange(a1 - a0)[:, None] - (b1 - b0) + (a1 - a0)
            seen = np.ones_like(distance, dtype=bool)
            if call.left != OPEN_WINDOW:
                seen &= distance >= -call.left
            if call.right != OPEN_WINDOW:
                seen &= distance <= call.right
            count[call.h0 : call.h1, i[a0:a1, None], j[None, b0:b1]] += seen
    return count


@pytest.mark.parametrize("name", SHAPES)
def test_calls_compute_each_pair_once(name: str) -> None:
    tiles = _tiles(name)
    rows, keys = int(tiles["q1"].max()), int(tiles["k1"].max())
    assert np.array_equal(_pairs(tiles, 4, rows, keys), dense_mask(tiles, 4, rows, keys).numpy())


def test_calls_of_random_tiles_compute_each_pair_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(300):
        rows, keys = (int(x) for x in random.integers(1, 70, 2))
        tiles = random_tiles(random, 3, rows, keys, steps=(1, 2, 3))
        random.shuffle(tiles)
        expected = dense_mask(tiles, 3, rows, keys).numpy()
        assert np.array_equal(_pairs(tiles, 3, rows, keys), expected)


def test_windows_of_tight_tiles_are_never_negative(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(300):
        rows, keys = (int(x) for x in random.integers(1, 70, 2))
        for call in window_calls(random_tiles(random, 3, rows, keys, steps=(1, 2))):
            assert min(call.left, call.right) >= OPEN_WINDOW


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


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_stand_in_has_the_wanted_delta(
    generator: torch.Generator, dtype: torch.dtype, magnitude: float
) -> None:
    magnitude = magnitude if dtype != torch.float16 else 1.0
    dout = torch.randn(2, 9, 3, 64, generator=generator, dtype=torch.float64) * magnitude
    delta = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64) * magnitude
    dout[:, 2], dout[:, 3], delta[:, 3] = 0.0, 0.0, 0.0
    dout, delta = dout.to(dtype), delta if dtype == torch.float64 else delta.float()
    new_dout, out = device_stand_in(dout, delta)
    assert new_dout.dtype == out.dtype == dtype
    got = (new_dout.double() * out.double()).sum(-1)
    assert_close("delta", delta.double(), got, 2 * torch.finfo(dtype).eps)
    changed = (new_dout - dout).double().abs().amax(-1) / magnitude
    assert not changed[:, 3:].any()
    assert not changed[:, :2].any()
    assert changed.max() <= 1e-3
    assert not out[:, 3].any()


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


def test_quirks_are_noticed(generator: torch.Generator) -> None:
    """The stand-in computes another mask where the longest key count is the true one."""
    op, tiles = StandInFlash(), _tiles("tall window")
    (call,) = window_calls(tiles)
    q, k = (torch.randn(n, 2, 16, generator=generator, dtype=torch.float64) for n in (300, 40))
    q_starts, k_starts = (torch.tensor(s, dtype=torch.int32) for s in call.starts)
    window = (call.left, call.right)
    good, _ = op.forward(q, k, k, Lengths(q_starts, k_starts, *call.longest), window, 0.25)
    bad, _ = op.forward(q, k, k, Lengths(q_starts, k_starts, 300, 40), window, 0.25)
    assert not torch.allclose(good, bad)


def test_stand_in_marks_rows_without_keys_with_plus_infinity() -> None:
    q = torch.ones(5, 1, 8)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 0, 4], dtype=torch.int32)
    out, lse = StandInFlash().forward(q, q[:4], q[:4], Lengths(*starts, 3, 4), (-1, -1), 1.0)
    assert torch.isposinf(lse[0, :2]).all()
    assert not torch.isinf(lse[0, 2:]).any()
    assert not out[:2].any()
    assert -float("inf") == NO_KEY


@pytest.mark.parametrize("lengths", [False, True], ids=["dense", "lengths"])
def test_aten_op_takes_our_arguments(lengths: bool) -> None:
    """Argument order and result layout, as far as PyTorch's shape functions know them."""
    lead = () if lengths else (2,)
    q, k = (
        torch.empty(*lead, n, h, 64, dtype=torch.bfloat16, device="meta")
        for n, h in ((30, 4), (40, 2))
    )
    starts = torch.zeros(4, dtype=torch.int32, device="meta")
    given = Lengths(starts, starts, 20, 30) if lengths else None
    op = AtenFlash()
    out, lse = op.forward(q, k, k, given, (7, 0), 0.125)
    assert out.shape == q.shape
    assert lse.shape == (*lead, 4, 30)
    assert lse.dtype == torch.float32
    grads = op.backward(out, q, k, k, out, lse, given, (7, 0), 0.125)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


REFUSED = [
    (FlashKernel, {"device": "cpu"}, "device cpu"),
    (Fa3Kernel, {"device": "cpu"}, "device cpu"),
    (Fa4Kernel, {"device": "cpu"}, "device cpu"),
    (FlashKernel, {"dtype": torch.float32}, "float32"),
    (FlashKernel, {"head_dim": (192, 128)}, "(192, 128)"),
    (FlashKernel, {"head_dim": (264, 264)}, "up to 256"),
    (FlashKernel, {"head_dim": (60, 60)}, "multiples of 8"),
    (Fa4Kernel, {"head_dim": (256, 256)}, "up to 128"),
    (FlashKernel, {"softcap": 30.0}, "softcap 30.0"),
    (Fa3Kernel, {}, "no Python module flash_attn_interface"),
    (Fa4Kernel, {}, "no Python module flash_attn.cute.interface"),
]


@pytest.mark.parametrize(("kernel", "changes", "reason"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refusal_names_value_and_rule(
    monkeypatch: pytest.MonkeyPatch, kernel: type, changes: dict[str, object], reason: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("ringattn.kernels.registered_flash.find_spec", lambda name: None)
    monkeypatch.setattr(_fa4, "_aten_to_fa4_window_size", None, raising=False)
    inputs = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": (64, 64), "softcap": None}
    assert reason in kernel().refusal(**(inputs | changes))


@pytest.mark.parametrize(
    ("window", "arguments"),
    [((-1, -1), (False, None, None)), ((-1, 0), (True, None, None)), ((5, 0), (False, 5, 0))],
    ids=str,
)
def test_causal_and_full_go_without_window_sizes(
    window: tuple[int, int], arguments: tuple[bool, int | None, int | None]
) -> None:
    assert window_arguments(window) == arguments


def test_the_wanted_implementation_is_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; a kernel of another one switches; PyTorch's own is what remains without any."""
    active: list[str | None] = [None]
    attention = torch.nn.attention
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: active[-1])
    monkeypatch.setattr(attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: active.append(None))
    q = torch.empty(1, 8, 1, 16, dtype=torch.bfloat16, device="meta")
    for name in (None, "FA3", "FA3", None, "FA4"):
        AtenFlash(name).forward(q, q, q, None, (-1, 0), 1.0)
    assert active == [None, "FA3", None, "FA4"]


def test_fa4_is_refused_where_pytorch_gives_it_no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_fa4, "_aten_to_fa4_window_size", raising=False)
    reason = Fa4Kernel().refusal(
        device="cuda", dtype=torch.bfloat16, head_dim=(128, 128), softcap=None
    )
    assert reason is not None
    assert "without windows" in reason


def test_accepts_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    monkeypatch.setattr("ringattn.kernels.registered_flash.find_spec", lambda name: object())
    monkeypatch.setattr(_fa4, "_aten_to_fa4_window_size", None, raising=False)
    for kernel in (FlashKernel(), Fa3Kernel(), Fa4Kernel()):
        assert (
            kernel.refusal(device="cuda", dtype=torch.bfloat16, head_dim=(128, 128), softcap=None)
            is None
        )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (12, 0))
    reason = Fa3Kernel().refusal(
        device="cuda", dtype=torch.bfloat16, head_dim=(128, 128), softcap=None
    )
    assert reason is not None
    assert "(12, 0)" in reason

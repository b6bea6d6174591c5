"""Ops of the windowed adapters: the stand-in's quirks, PyTorch's arguments, refusals, delta."""

import pytest
import torch
from torch.nn.attention import _fa4

from ringattn.kernels.band_windows import window_calls
from ringattn.kernels.fa3 import Fa3Kernel
from ringattn.kernels.fa4 import Fa4Kernel
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.flash_op import AtenFlash, Lengths, window_arguments
from ringattn.kernels.stand_in import device_stand_in
from tests.closeness import assert_close
from tests.kernels.flash_stand_in import StandInFlash
from tests.kernels.problems import tile_table
from tests.kernels.test_adapters import SHAPES


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


def test_quirks_are_noticed(generator: torch.Generator) -> None:
    """The stand-in computes another mask where the longest key count is the true one."""
    op, tiles = StandInFlash(), tile_table(*SHAPES["tall window"])
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

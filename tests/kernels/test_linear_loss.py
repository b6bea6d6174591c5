"""Linear + cross entropy in chunks: exactness, what counts, what is allocated, what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ringattn.errors import UserError
from ringattn.kernels import linear_cross_entropy, linear_loss
from tests.closeness import assert_close, rel_error

IGNORE = -100
REL = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
NAMES = ("loss", "dhidden", "dweight", "dbias")
PATTERNS: dict[str, Callable[[int], torch.Tensor]] = {
    "all": lambda n: torch.ones(n, dtype=torch.bool),
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
    "most": lambda n: torch.arange(n) % 7 != 3,
    "first": lambda n: torch.arange(n) == 0,
    "tail": lambda n: torch.arange(n) >= n - 5,
}


def inputs(
    n: int, dtype: torch.dtype, *, dim: int = 24, classes: int = 101, pattern: str = "most"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """[hidden, weight, bias], with logits of a few units, and labels."""
    tensors = [torch.randn(n, dim), torch.randn(classes, dim) / 2, torch.randn(classes)]
    labels = torch.randint(classes, (n,)).where(PATTERNS[pattern](n), IGNORE)
    return [x.to(dtype).requires_grad_() for x in tensors], labels


def reference(
    tensors: list[torch.Tensor], labels: torch.Tensor, *, softcap: float | None, scale: float
) -> list[torch.Tensor]:
    hidden, weight, bias = (x.detach().double().requires_grad_() for x in tensors)
    logits = F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    keep = labels != IGNORE
    loss = F.cross_entropy(logits[keep], labels[keep], reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss * scale, [hidden, weight, bias])]


def ours(
    tensors: list[torch.Tensor], labels: torch.Tensor, *, scale: float = 1.0, **options: Any
) -> list[torch.Tensor]:
    hidden, weight, bias = tensors
    loss = linear_cross_entropy(hidden, weight, labels, bias_V=bias, **options)
    return [loss.detach(), *torch.autograd.grad(loss * scale, tensors)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", REL, ids=str)
def test_against_float64(dtype: torch.dtype, pattern: str, softcap: float | None) -> None:
    for n in (1, 8, 37):
        tensors, labels = inputs(n, dtype, pattern=pattern)
        expected = reference(tensors, labels, softcap=softcap, scale=0.3)
        for rows in (1, 8, 64, None):
            got = ours(tensors, labels, softcap=softcap, scale=0.3, rows=rows)
            assert [x.dtype for x in got[1:]] == [dtype] * 3
            for name, want, found in zip(NAMES, expected, got, strict=True):
                assert_close(f"{name} of {n} in {rows}", want, found, REL[dtype])


@pytest.mark.parametrize("dtype", REL, ids=str)
def test_loss_is_wide_and_weights_are_converted_in_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum keeps float32's precision and range: 70K is infinite in float16."""
    monkeypatch.setattr("ringattn.kernels.linear_products.BLOCK", 24 * 17)
    tensors, labels = inputs(700, dtype)
    with torch.no_grad():
        tensors[0].mul_(30)
    got = ours(tensors, labels, rows=96)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference(tensors, labels, softcap=None, scale=1.0)
    assert expected[0] > 66_000
    assert_close("loss", expected[0], got[0], 1e-6)
    for name, want, found in zip(NAMES[1:], expected[1:], got[1:], strict=True):
        assert_close(name, want, found, REL[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_no_worse_than_whole_logits(dtype: torch.dtype) -> None:
    tensors, labels = inputs(300, dtype, dim=64, classes=400)
    expected = reference(tensors, labels, softcap=None, scale=1 / 300)
    hidden, weight, bias = tensors
    logits = F.linear(hidden, weight, bias).float()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    naive = [loss.detach(), *torch.autograd.grad(loss / 300, tensors)]
    got = ours(tensors, labels, scale=1 / 300, rows=32)
    for name, want, other, found in zip(NAMES, expected, naive, got, strict=True):
        assert rel_error(want, found) <= 1.1 * rel_error(want, other), name


@pytest.mark.parametrize("index", [7, -1, 500])
def test_any_index_can_be_ignored(index: int) -> None:
    tensors, labels = inputs(40, torch.float64)
    other = labels.where(labels != 7, 8)
    expected = reference(tensors, other, softcap=None, scale=1.0)
    got = ours(tensors, other.where(other != IGNORE, index), ignore_index=index, rows=9)
    for name, want, found in zip(NAMES, expected, got, strict=True):
        assert_close(name, want, found, 1e-14)


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_counted_is_exactly_zero_and_reaches_every_tensor(n: int) -> None:
    tensors, labels = inputs(n, torch.bfloat16, pattern="none")
    for tensor in ours(tensors, labels):
        assert not tensor.any()
    assert [x.shape for x in ours(tensors, labels)[1:]] == [x.shape for x in tensors]


def test_uncounted_rows_are_never_read() -> None:
    tensors, labels = inputs(40, torch.float32)
    with torch.no_grad():
        tensors[0][labels == IGNORE] = float("nan")
    loss, dhidden, dweight, _ = ours(tensors, labels)
    assert loss.isfinite()
    assert dweight.isfinite().all()
    assert not dhidden[labels == IGNORE].any()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("more", [0, 3])
def test_a_given_count_changes_nothing(pattern: str, more: int) -> None:
    tensors, labels = inputs(40, torch.float64, pattern=pattern)
    counted = min(40, int((labels != IGNORE).sum()) + more)
    for want, found in zip(
        ours(tensors, labels, rows=9), ours(tensors, labels, rows=9, counted=counted), strict=True
    ):
        torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)


def test_too_low_a_count_gives_no_number() -> None:
    tensors, labels = inputs(40, torch.float32)
    assert ours(tensors, labels, counted=3)[0].isnan()


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation returned or allocated, in elements, and products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.ringattn.linear_cross_entropy.default:
            with self:  # an operator hides what runs inside it
                return linear_loss._in_chunks(*args)
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
        )
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_holds_all_logits(dtype: torch.dtype) -> None:
    n, dim, classes, rows = 512, 8, 300, 16
    tensors, labels = inputs(n, dtype, dim=dim, classes=classes)
    with LargestTensor() as ours_largest:
        ours(tensors, labels, rows=rows)
    assert ours_largest.numel <= max(rows * classes, n * dim)
    with LargestTensor() as all_at_once:
        ours(tensors, labels, rows=n)
    assert all_at_once.numel >= n * classes // 2  # the measure sees logits where there are any


def test_default_chunk_is_bounded_by_classes_and_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "LOGITS", 8192)
    for dim, rows in ((8, 8192 // 300), (80, 40)):
        tensors, labels = inputs(128, torch.float32, dim=dim, classes=300, pattern="all")
        for tensor in tensors:
            tensor.requires_grad_(tensor is tensors[1])
        with LargestTensor() as largest:
            linear_cross_entropy(tensors[0], tensors[1], labels).backward()
        assert largest.numel == max(rows, dim) * 300


@pytest.mark.parametrize("wanted", ["none", "no_grad", "hidden", "weight", "all"])
def test_only_wanted_gradients_are_computed(wanted: str) -> None:
    tensors, labels = inputs(32, torch.float32, pattern="all")
    for name, tensor in zip(("hidden", "weight", "bias"), tensors, strict=True):
        tensor.requires_grad_(wanted in (name, "all", "no_grad"))
    with LargestTensor() as seen, torch.set_grad_enabled(wanted != "no_grad"):
        loss = linear_cross_entropy(tensors[0], tensors[1], labels, bias_V=tensors[2], rows=8)
        if loss.requires_grad:
            loss.backward()
    assert (
        seen.products == 4 * {"none": 1, "no_grad": 1, "hidden": 2, "weight": 2, "all": 3}[wanted]
    )
    with_gradient = [x.grad is not None for x in tensors]
    assert with_gradient == [x.requires_grad and wanted != "no_grad" for x in tensors]


def test_autocast_takes_16_bit_operands_and_keeps_float32_gradients() -> None:
    tensors, labels = inputs(64, torch.float32)
    rounded = [x.detach().bfloat16() for x in tensors[:2]] + [tensors[2].detach()]
    expected = reference(rounded, labels, softcap=None, scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(tensors, labels, rows=16)
    assert {x.dtype for x in got} == {torch.float32}
    assert_close("loss", expected[0], got[0], 1e-6)
    for name, want, found in zip(NAMES[1:], expected[1:], got[1:], strict=True):
        assert_close(name, want, found, REL[torch.bfloat16])


def test_compiled_and_checkpointed() -> None:
    tensors, labels = inputs(40, torch.float32)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels, bias_V=bias, rows=16) / 3

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again = checkpoint(loss, *tensors, use_reentrant=False)
    for value in (compiled(*tensors), again):
        for want, found in zip(expected, torch.autograd.grad(value, tensors), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_operator_keeps_the_rules_of_custom_operators() -> None:
    (hidden, weight, bias), labels = inputs(12, torch.float64)
    settings = (IGNORE, 0.0, -1, 5, torch.float64, True, True, True)
    torch.library.opcheck(
        torch.ops.ringattn.linear_cross_entropy.default, (hidden, weight, labels, bias, *settings)
    )


def test_second_backward_and_second_derivatives_are_refused() -> None:
    tensors, labels = inputs(12, torch.float32)
    loss = linear_cross_entropy(tensors[0], tensors[1], labels)
    torch.autograd.grad(loss, tensors[:2], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, tensors[:2])
    loss = linear_cross_entropy(tensors[0], tensors[1], labels)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, tensors[:2], create_graph=True)


def test_a_wrong_chunk_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: without the label's own part, or with a chunk left out."""
    tensors, labels = inputs(37, torch.float32)
    expected = reference(tensors, labels, softcap=None, scale=1.0)
    right, calls = linear_loss.add_weight_grad, []

    def every_other(*args: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) % 2:
            right(*args)

    monkeypatch.setattr(linear_loss, "add_weight_grad", every_other)
    got = ours(tensors, labels, rows=8)
    assert rel_error(expected[2], got[2]) > 0.1
    assert rel_error(expected[1], got[1]) < REL[torch.float32]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, "must be"),
        ({"labels_N": torch.zeros(4, dtype=torch.int32)}, "int64"),
        ({"labels_N": torch.tensor([0, 1, 9, 2])}, "label 9: must be in"),
        ({"weight_VC": torch.zeros(9, 5)}, "must be"),
        ({"bias_V": torch.zeros(4)}, "bias"),
        ({"softcap": 0.0}, "softcap"),
        ({"counted": 5}, "counted"),
        ({"rows": 0}, "rows"),
    ],
)
def test_refusals(change: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"hidden_NC": torch.zeros(4, 6), "weight_VC": torch.zeros(9, 6)}
    given["labels_N"] = torch.tensor([0, 1, IGNORE, 2])
    with pytest.raises(UserError, match=match):
        linear_cross_entropy(**(given | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REL, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_on_cuda(dtype: torch.dtype, given: bool) -> None:
    tensors, labels = inputs(300, dtype, dim=64, classes=512)
    expected = reference(tensors, labels, softcap=5.0, scale=0.3)
    on_device = [x.detach().cuda().requires_grad_() for x in tensors]
    counted = int((labels != IGNORE).sum()) if given else None
    got = ours(on_device, labels.cuda(), softcap=5.0, scale=0.3, rows=64, counted=counted)
    for name, want, found in zip(NAMES, expected, got, strict=True):
        assert_close(name, want, found, REL[dtype])

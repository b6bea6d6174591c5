"""Choice of a kernel: refusals name value and rule, auto falls back."""

import pytest
import torch

from ringattn.errors import UserError
from ringattn.kernels import choose_kernel, kernel_by_name, kernel_names


def _choose(name: str, **changes: object) -> str:
    inputs = {"device": "cpu", "dtype": torch.bfloat16, "head_dim": (64, 64), "softcap": None}
    return choose_kernel(name, **(inputs | changes)).name  # type: ignore[arg-type]


def test_every_name_gives_its_kernel() -> None:
    assert set(kernel_names()) >= {"cpu_flash", "matmul"}
    for name in kernel_names():
        assert kernel_by_name(name).name == name


def test_auto_takes_flash_on_cpu() -> None:
    assert _choose("auto") == "cpu_flash"


REFUSED = [
    ({"softcap": 30.0}, "softcap 30.0"),
    ({"head_dim": (192, 128)}, "(192, 128)"),
    ({"device": "cuda"}, "device cuda"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refusal_names_the_value(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError) as error:
        _choose("cpu_flash", **changes)
    assert reason in str(error.value)


@pytest.mark.parametrize("changes", [{"softcap": 30.0}, {"head_dim": (192, 128)}], ids=str)
def test_auto_falls_back_to_matmul(changes: dict[str, object]) -> None:
    assert _choose("auto", **changes) == "matmul"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="matmul"):
        kernel_by_name("nope")


def test_integers_are_refused_by_all() -> None:
    with pytest.raises(UserError, match="int64"):
        _choose("auto", dtype=torch.int64)

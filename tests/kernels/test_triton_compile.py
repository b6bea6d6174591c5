"""The band kernel's shipped configurations, compiled ahead of time: no spills, everything fits."""

import os
import subprocess
import sys

import pytest

from ringattn.benchmarks.triton_compile import PARTS, Resources, Variant, main, problem, shipped
from ringattn.kernels.triton_configs import BlockConfig

VARIANT = Variant("sm_90", "forward", (128, 128), 2, BlockConfig(128, 128, 8, 2, True))


def _compile(*arguments: str) -> str:
    """The command's output; triton is imported anew, to compile and not to interpret."""
    done = subprocess.run(
        [sys.executable, "-m", "ringattn.benchmarks.triton_compile", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_bf16_of_head_dim_128(arch: str) -> None:
    output = _compile(arch, "--dims", "128", "--dtypes", "bf16")
    assert "no spills" in output
    assert all(part in output for part in PARTS)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ["default", "sm_80", "sm_90", "sm_100"])
def test_everything_shipped(arch: str) -> None:
    assert "no spills" in _compile(arch)


@pytest.mark.parametrize(
    "used, reason",
    [
        (Resources(255, 1000, 16, False, False), "16 bytes spilled"),
        (Resources(255, 232_449, 0, False, False), "limit 232448"),
        (Resources(255, 1000, 0, True, False), "serialized"),
        (Resources(4, 1000, 0, False, True), "tensor memory"),
        (Resources(255, 232_448, 0, False, False), ""),
    ],
)
def test_what_may_not_ship(used: Resources, reason: str) -> None:
    assert reason in problem(VARIANT, used)
    assert bool(reason) == bool(problem(VARIANT, used))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sm_90", "--dims", "128"], "TRITON_INTERPRET is set"),
        (["sm_90", "--dtypes", "fp64"], "invalid choice"),
        (["sm_1"], "unknown"),
    ],
)
def test_mistakes_end_with_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_all_kernels_of_an_architecture_are_looked_at() -> None:
    variants = list(shipped("sm_90"))
    assert {v.part for v in variants} == set(PARTS)
    assert {(v.head_dim[0], v.itemsize) for v in variants} == {
        (64, 2), (128, 2), (256, 2), (64, 4), (128, 4),
    }  # fmt: skip
    assert {v.softcap for v in variants} == {v.listed for v in variants} == {True, False}

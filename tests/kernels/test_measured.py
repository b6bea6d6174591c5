"""The choice by a measured table: nearest cases, what is missing, defaults, overrides."""

from dataclasses import replace

import pytest
import torch

from ringattn.errors import UserError
from ringattn.kernels import select
from ringattn.kernels.base import Kernel
from ringattn.kernels.matmul import MatmulKernel
from ringattn.kernels.measured import FAR, Row, Table, Work, architecture_of, shipped_table
from ringattn.kernels.select import choose_kernels, default_order, kernel_order

BF16 = torch.bfloat16
WORK = Work(
    direction="forward", group=8, qk_dim=128, v_dim=128, flops=1e12, keys_per_row=4096.0,
    tile_pairs=1e8, fill=0.98, plain=True, blocks=False,
)  # fmt: skip
THIN = replace(WORK, keys_per_row=128.0, tile_pairs=1e5, fill=0.5)
BACK = replace(WORK, direction="backward")


class Fake(MatmulKernel):
    """A kernel of another name that refuses what it is told to."""

    def __init__(self, name: str, refuses: str | None = None) -> None:
        self.name, self._refuses = name, refuses

    def refusal(self, **_: object) -> str | None:
        return self._refuses


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Kernels by name with their refusals; a test may change them."""
    names = ("matmul", "flex", "triton", "cpu_flash", "cudnn", "fa3", "extra")
    refusals: dict[str, str | None] = dict.fromkeys(names)

    def known() -> dict:
        def make(name: str) -> Kernel:
            return Fake(name, refusals[name])

        return {name: (lambda name=name: make(name)) for name in refusals}

    monkeypatch.setattr(select, "_registry", known)
    return refusals


def table(*rows: tuple[Work, dict[str, float]], dtype: str = "bfloat16") -> Table:
    return Table(tuple(Row("sm_90", dtype, work, tflops) for work, tflops in rows))


def order(work: Work | None, measured: Table, **changes) -> tuple[str, ...]:
    inputs = {"device": "cuda", "dtype": BF16, "architecture": "sm_90", **changes}
    return kernel_order(work=work, table=measured, **inputs)


@pytest.mark.usefixtures("registry")
def test_the_default_order_prefers_libraries_for_plain_work_only() -> None:
    rest = ("cpu_flash", "extra", "matmul")  # in the order of the registry, the fallback last
    assert default_order("cuda", WORK, None) == ("fa3", "cudnn", "triton", "flex", *rest)
    for work, softcap in [
        (None, None),
        (WORK, 30.0),
        (replace(WORK, plain=False), None),
        (replace(WORK, v_dim=64), None),
        (replace(WORK, blocks=True), None),
    ]:
        found = default_order("cuda", work, softcap)
        assert found == ("triton", "flex", "fa3", "cudnn", *rest)
    for softcap in (None, 30.0):
        assert default_order("cpu", WORK, softcap)[:2] == ("cpu_flash", "matmul")


@pytest.mark.usefixtures("registry")
def test_the_nearest_case_decides() -> None:
    measured = table(
        (WORK, {"fa3": 600.0, "triton": 500.0}), (THIN, {"fa3": 100.0, "triton": 300.0})
    )
    near_work = replace(WORK, keys_per_row=5000.0, flops=1.5e12)
    near_thin = replace(THIN, keys_per_row=100.0, plain=False)
    assert order(near_work, measured)[:2] == ("fa3", "triton")
    assert order(near_thin, measured)[:2] == ("triton", "fa3")
    # Unmeasured kernels follow, in the default order.
    assert order(near_work, measured)[2:4] == ("cudnn", "flex")


@pytest.mark.usefixtures("registry")
def test_sizes_do_not_outvote_the_nearest_case() -> None:
    """Speeds count relative to the fastest of a case, not absolutely."""
    large = replace(WORK, flops=1e15)
    measured = table((WORK, {"fa3": 5.0, "triton": 10.0}), (large, {"fa3": 700.0, "triton": 400.0}))
    assert order(WORK, measured)[0] == "triton"
    assert order(large, measured)[0] == "fa3"


@pytest.mark.usefixtures("registry")
def test_a_kernel_that_failed_in_the_nearest_case_comes_behind() -> None:
    measured = table((THIN, {"triton": 200.0}), (WORK, {"fa3": 650.0, "triton": 500.0}))
    assert order(THIN, measured)[0] == "triton"


@pytest.mark.usefixtures("registry")
def test_directions_choose_for_themselves() -> None:
    measured = table((WORK, {"fa3": 600.0, "triton": 500.0}), (BACK, {"fa3": 300.0, "triton": 400}))
    assert order(WORK, measured)[0] == "fa3"
    assert order(BACK, measured)[0] == "triton"


@pytest.mark.usefixtures("registry")
def test_rows_that_do_not_apply_leave_the_default_order() -> None:
    rows = table((WORK, {"triton": 900.0, "fa3": 1.0}))
    default = default_order("cuda", WORK, None)
    assert order(WORK, rows)[0] == "triton" != default[0]
    assert order(WORK, Table()) == default
    assert order(WORK, rows, architecture="sm_100") == default
    assert order(WORK, rows, dtype=torch.float32) == default
    assert order(WORK, rows, dtype=torch.float16)[0] == "triton"  # 16 bits run alike
    assert order(BACK, rows) == default
    far = replace(WORK, qk_dim=8, v_dim=128)
    assert WORK.distance(far) == FAR
    assert WORK.distance(replace(far, group=1)) > FAR
    assert order(replace(WORK, qk_dim=8, v_dim=8), rows) == default
    assert order(WORK, rows, softcap=20.0) == default_order("cuda", WORK, 20.0)
    blocked = replace(WORK, blocks=True)
    assert order(blocked, rows) == default_order("cuda", blocked, None)


def test_refused_kernels_are_left_out_and_named_with_their_reasons(
    registry: dict[str, str | None],
) -> None:
    rows = table((WORK, {"triton": 900.0, "fa3": 800.0}))
    inputs = {"device": "cuda", "dtype": BF16, "head_dim": (128, 128), "work": WORK}
    registry["triton"] = "is not installed"
    found = choose_kernels("auto", architecture="sm_90", table=rows, **inputs)
    assert [k.name for k in found][:2] == ["fa3", "cudnn"]
    with pytest.raises(UserError, match="triton: is not installed"):
        choose_kernels("triton", architecture="sm_90", table=rows, **inputs)
    # A name overrides what the table says.
    assert [k.name for k in choose_kernels("flex", table=rows, **inputs)] == ["flex"]
    registry.update(dict.fromkeys(registry, "no"))
    with pytest.raises(UserError, match="fa3: no; .*matmul: no"):
        choose_kernels("auto", architecture="sm_90", table=rows, **inputs)


def test_a_table_survives_its_file() -> None:
    made = table((WORK, {"triton": 612.5}), (THIN, {"fa3": 1.0, "flex": 2.0}))
    assert Table.from_json(made.to_json()) == made
    assert Table.from_json(Table().to_json()) == Table()


@pytest.mark.parametrize("text", ["", "[]", '{"columns": [], "rows": []}', "{}"])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"measured\.json.*not a table"):
        Table.from_json(text, "measured.json")


def test_merging_replaces_figures_of_the_same_case() -> None:
    old = table((WORK, {"triton": 500.0, "fa3": 600.0}), (THIN, {"flex": 3.0}))
    new = table((WORK, {"triton": 650.0}), (BACK, {"triton": 400.0}))
    merged = {row.work: dict(row.tflops) for row in old.merged(new.rows).rows}
    assert merged == {
        WORK: {"triton": 650.0, "fa3": 600.0},
        THIN: {"flex": 3.0},
        BACK: {"triton": 400.0},
    }
    assert old.merged(new.rows) == old.merged(reversed(new.rows))


def test_the_shipped_table_names_known_directions_and_positive_speeds() -> None:
    for row in shipped_table().rows:
        assert row.work.direction in ("forward", "backward")
        assert row.tflops
        assert min(row.tflops.values()) > 0
        assert row.work.distance(row.work) == 0


def test_the_cpu_is_its_own_architecture() -> None:
    assert architecture_of(torch.device("cpu")) == "cpu"

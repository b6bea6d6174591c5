"""Plans over simulated ranks, in float64, against the dense reference.

The default run takes a pairwise-covering part of mask × layout × method × ranks and nodes × heads ×
batch × kernel (with sinks, softcap, unequal head dims), and one of other dtypes; the whole product
is marked full and resumable. Every plan is proved on integers too. `tests/core/product.py` has the
axes.
"""

import itertools
from typing import Any

import pytest
import torch

import ringattn as ra
from ringattn import Mask, PlanError, UserError, masks
from ringattn.choice import imbalance
from ringattn.methods import METHODS
from tests.core import product
from tests.core.cases import (
    LAYOUTS,
    MASKS,
    METHOD_NAMES,
    Case,
    Inputs,
    context_of,
    inputs,
    inputs_of,
    mask_of,
    mixed,
    plan_of,
    reference_of,
)
from tests.core.exactness import (
    TOLERANCE,
    assert_exact,
    relative_errors,
    same_bits,
    simulate_plan,
    simulated_errors,
)
from tests.core.handmade import travelling_plan
from tests.grid import run_grid

COVERING = product.covering()
LARGE: dict[str, Mask] = {
    "causal": masks.causal(320),
    "window": masks.sliding_window(320, 150, 0),
    "documents": masks.documents([150, 3, 1, 140, 26], causal=True),
    "dual_scope": masks.dual_scope(300, 140, 20, 64),
}


def _case(**values: Any) -> Case:
    base = {
        "mask": "documents_causal",
        "layout": "zigzag",
        "method": "ring",
        "world": 3,
        "group": 4,
        "batch": 2,
        "kernel": "cpu_flash",
    }
    return base | values


@pytest.mark.parametrize("mask", MASKS)
def test_a_covering_part_of_the_product(mask: str) -> None:
    for case in (c for c in COVERING if c["mask"] == mask):
        try:
            assert_exact(product.proved_errors(case))
        except (AssertionError, PlanError) as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("precision", product.PRECISION_AXES["precision"])
def test_a_covering_part_in_other_dtypes(precision: str) -> None:
    for case in (c for c in product.covering_precisions() if c["precision"] == precision):
        parts = product.part_of_allowed(case)
        assert max(parts.values()) <= 1, f"{case}: {parts} of the errors allowed"


def test_the_covering_part_covers_what_is_allowed() -> None:
    """Every two values of two axes that some case of the whole product has together."""
    cases = [product.values_of(case) for case in COVERING]
    axes = {name: {case[name] for case in cases} for name in product.AXES}
    assert axes["ranks"] == set(product.FEW_RANKS)
    assert axes["method"] == {*METHOD_NAMES, product.CONTEXT_FIRST}
    for name in ("mask", "layout", "heads", "batch", "kernel"):
        assert axes[name] == set(product.AXES[name])
    whole = [product.values_of(case) for case in product.whole()]
    for a, b in itertools.combinations(product.AXES, 2):
        possible = {(c[a], c[b]) for c in whole if c[a] in axes[a] and c[b] in axes[b]}
        assert possible <= {(case[a], case[b]) for case in cases}


@pytest.mark.full
@pytest.mark.timeout(8 * 3600)
def test_the_whole_product(grid_seconds: float | None) -> None:
    run_grid(
        "attention_simulated",
        mixed(product.whole()),
        product.proved_errors,
        tolerance=TOLERANCE,
        axes=("mask", "method", "layout", "world", "node", "heads", "kernel"),
        seconds=grid_seconds,
        note="Every mask, layout, method, ranks and nodes; heads, batch and kernel of each are "
        "drawn from a seed. Every plan is also proved by the symbolic verifier.",
    )


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_many_cases_in_other_dtypes(grid_seconds: float | None) -> None:
    run_grid(
        "attention_simulated_dtypes",
        mixed(product.some_precisions()),
        product.part_of_allowed,
        tolerance=1.0,
        axes=("precision", "mask", "method", "layout", "world", "heads"),
        seconds=grid_seconds,
        note=f"Cases drawn from a seed. Errors are relative, in units of those allowed, which are "
        f"{product.ALLOWED_EPS} times the dtype's eps.",
    )


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("layout", ["contiguous", "striped", "area_greedy"])
def test_shards_larger_than_a_kernel_block(name: str, layout: str) -> None:
    mask = LARGE[name]
    x = inputs(mask.seq_len, 4, 1)
    want = ra.reference(x.q, x.k, x.v, mask, x.dout)
    for method, kernel in itertools.product(METHODS, ("cpu_flash", "matmul")):
        context = ra.ContextParallel(
            2, heads=(4, 1), head_dim=8, dtype=torch.float64,
            method=method, layout=layout, kernel=kernel,
        )  # fmt: skip
        assert_exact(relative_errors(simulate_plan(context.plan(mask), x), want))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_moves_of_queries_outputs_and_heads(layout: str, world: int) -> None:
    """A plan whose queries travel: what neither ring nor direct uses of the executor."""
    for mask, group in (("streaming", 1), ("strided_bands", 4)):
        case = _case(mask=mask, layout=layout, world=world, group=group)
        shards = LAYOUTS[layout](mask_of(mask), world)
        plan = travelling_plan(context_of(case, world), mask_of(mask), shards)
        ra.verify(plan)
        assert_exact(relative_errors(simulate_plan(plan, inputs_of(case)), reference_of(case)))


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("kernel", ["cpu_flash+sinks", "matmul+softcap"])
def test_two_runs_give_the_same_bits(method: str, kernel: str) -> None:
    case = _case(method=method, kernel=kernel, world=4, layout="scattered")
    plan = plan_of(case)
    first = simulate_plan(plan, inputs_of(case))
    assert same_bits(first, simulate_plan(plan, inputs_of(case)))
    assert same_bits(first, simulate_plan(plan_of(case), inputs_of(case)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_bytes_and_bits_in_other_dtypes(method: str, dtype: torch.dtype) -> None:
    """Wire bytes equal the plan's count in every dtype, with partials in either wire dtype."""
    case = _case(method=method, world=4, layout="striped", kernel="matmul")
    x = inputs_of(case)
    cast = Inputs(*(t.to(dtype) for t in x.tensors), sinks=None, softcap=None)
    for wire_dtype in (torch.float32, dtype):
        plan = plan_of(case, dtype=dtype, wire_dtype=wire_dtype)
        first, second = simulate_plan(plan, cast), simulate_plan(plan, cast)
        assert same_bits(first, second)
        assert first.dk is not None
        assert (first.out.dtype, first.lse.dtype, first.dk.dtype) == (dtype, torch.float32, dtype)


def test_rows_without_keys_are_zero_everywhere() -> None:
    case = _case(mask="strided_bands", layout="contiguous")
    idle = ~torch.from_numpy(mask_of("strided_bands").dense()).any(1)
    result = simulate_plan(plan_of(case), inputs_of(case))
    assert idle.any()
    assert (result.out[:, idle] == 0).all()
    assert result.dq is not None
    assert (result.dq[:, idle] == 0).all()
    assert (result.lse[:, idle] == -torch.inf).all()


def test_a_mask_without_pairs() -> None:
    x = inputs(16, 1, 1)
    for method in METHODS:
        context = ra.ContextParallel(
            2, heads=(4, 4), head_dim=8, dtype=torch.float64, method=method, layout="zigzag"
        )
        result = simulate_plan(context.plan(masks.from_bands(16, [])), x)
        assert not any(
            t.any() for t in (result.out, result.dq, result.dk, result.dv) if t is not None
        )
        assert (result.lse == -torch.inf).all()


@pytest.mark.parametrize("kernel", ["cpu_flash", "matmul"])
@pytest.mark.parametrize("mask", ["documents_causal", "blocks", "routed"])
def test_an_empty_batch(mask: str, kernel: str) -> None:
    case = _case(mask=mask, kernel=kernel)
    x = inputs_of(case)
    empty = Inputs(*(t[:0] for t in x.tensors), sinks=None, softcap=None)
    result = simulate_plan(plan_of(case), empty)
    assert result.out.shape == (0, *x.q.shape[1:])
    want = ra.reference(*empty.tensors[:3], mask_of(mask), empty.dout)
    assert want.out.shape == result.out.shape


@pytest.mark.parametrize("method", ["ulysses", "usp", "hybrid"])
def test_one_group_that_counts_its_heads(method: str) -> None:
    """Slices of heads of a mask whose only group says for how many heads it is."""
    mask = masks.per_head([(4, masks.documents([20, 28], causal=True))])
    x = inputs(48, 1, 1, "cpu_flash")
    context = ra.ContextParallel(
        2, heads=(4, 4), head_dim=8, dtype=torch.float64, method=method, layout="contiguous"
    )
    got = simulate_plan(context.plan(mask), x)
    assert_exact(relative_errors(got, ra.reference(*x.tensors[:3], mask, x.dout)))


def test_a_given_scale() -> None:
    case = _case(kernel="matmul")
    x, mask = inputs_of(case), mask_of(case["mask"])
    got = ra.simulate(plan_of(case), x.q, x.k, x.v, x.dout, scale=0.7)
    assert_exact(relative_errors(got, ra.reference(x.q, x.k, x.v, mask, x.dout, scale=0.7)))


def test_forward_alone() -> None:
    case = _case()
    x = inputs_of(case)
    result = ra.simulate(plan_of(case), x.q, x.k, x.v)
    assert torch.equal(result.out, simulate_plan(plan_of(case), x).out)
    assert (result.dq, result.dk, result.dv, result.dsinks) == (None,) * 4


def test_layout_and_method_left_to_the_library() -> None:
    for mask_name in MASKS:
        mask = mask_of(mask_name)
        x = inputs(mask.seq_len, 4, 1)
        context = ra.ContextParallel(3, heads=(4, 1), head_dim=8, dtype=torch.float64)
        want = ra.reference(x.q, x.k, x.v, mask, x.dout)
        assert_exact(relative_errors(simulate_plan(context.plan(mask), x), want))


def test_auto_balances_causal_and_keeps_windows_local() -> None:
    tokens = 1 << 16
    shapes: dict[str, Any] = {"heads": (32, 8), "head_dim": 128, "dtype": torch.bfloat16}
    auto = ra.ContextParallel(4, **shapes)
    assert auto.plan(masks.full(tokens)).layout.name == "contiguous"
    causal = auto.plan(masks.causal(tokens))
    assert imbalance(causal.mask, causal.layout) < 1.05
    window = auto.plan(masks.sliding_window(tokens, 1023, 0))
    assert window.layout.name == "contiguous"
    zigzag = ra.ContextParallel(4, **shapes, layout="zigzag").plan(window.mask)
    for rank in range(4):
        assert window.bytes(rank, "forward") <= 2 * 1023 * 8 * 128 * 2
        assert window.bytes(rank, "forward") <= zigzag.bytes(rank, "forward")


@pytest.mark.parametrize("kernel", ["matmul+softcap", "matmul+dims"])
def test_what_cpu_flash_cannot_do_is_refused(kernel: str) -> None:
    case = _case(kernel=kernel.replace("matmul", "cpu_flash"))
    with pytest.raises(UserError, match="cpu_flash"):
        simulated_errors(case)

"""The comparison itself: it must fail on what is wrong and accept what is equal."""

import math

import pytest
import torch

from tests.closeness import assert_close, rel_error

INF = math.inf


def test_relative_error_is_the_ratio_of_norms() -> None:
    assert rel_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "ref, got, error",
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-3], 1e-3),
        ([-INF, 1.0], [-INF, 1.0], 0.0),
        ([-INF, -INF], [-INF, -INF], 0.0),
        ([-INF, 1.0], [0.0, 1.0], INF),
        ([-INF, 1.0], [INF, 1.0], INF),
        ([1.0, 1.0], [math.nan, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_special_values(ref: list[float], got: list[float], error: float) -> None:
    measured = rel_error(
        torch.tensor(ref, dtype=torch.float64), torch.tensor(got, dtype=torch.float64)
    )
    assert measured == error


def test_the_message_names_the_tensor_and_the_worst_element() -> None:
    ref = torch.ones(2, 3)
    got = ref.clone()
    got[1, 2] = 1.5
    with pytest.raises(AssertionError, match=r"dq: relative error .* worst at \(1, 2\)"):
        assert_close("dq", ref, got, 1e-6)


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_non_finite_result_fails(value: float) -> None:
    ref = torch.tensor([-INF, 1.0, 2.0])
    got = ref.clone()
    got[1] = value
    with pytest.raises(AssertionError, match=r"lse: .* worst at \(1,\)"):
        assert_close("lse", ref, got, 1.0)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"out: shape \(2, 1\), reference \(2,\)"):
        assert_close("out", torch.ones(2), torch.ones(2, 1), 1.0)

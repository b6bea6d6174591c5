"""Every pair is covered, with few cases, the same ones each time."""

import itertools
from typing import Any

import pytest

from tests.pairwise import drawn_pairwise, pairwise

AXES: dict[str, list] = {
    "mask": [f"mask{i}" for i in range(12)],
    "layout": ["contiguous", "zigzag", "striped", "area_greedy"],
    "method": ["ring", "direct"],
    "world": [1, 2, 3, 4],
    "ratio": [1, 4],
}


def _pairs(cases: list[dict[str, Any]]) -> set[tuple]:
    return {pair for case in cases for pair in itertools.combinations(case.items(), 2)}


def _product(axes: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def test_all_pairs_are_covered_by_few_cases() -> None:
    cases = pairwise(AXES)
    assert _pairs(cases) == _pairs(_product(AXES))
    assert 48 <= len(cases) <= 60  # 12 masks x 4 layouts is the floor, the product is 768


def test_the_cases_are_the_same_each_time() -> None:
    assert pairwise(AXES) == pairwise(AXES)


def test_forbidden_cases_are_left_out_and_the_rest_is_still_covered() -> None:
    def allowed(case: dict[str, Any]) -> bool:
        return not (case["layout"] == "striped" and case["world"] == 1)

    cases = pairwise(AXES, allowed)
    assert all(map(allowed, cases))
    assert _pairs(cases) == _pairs([case for case in _product(AXES) if allowed(case)])


def test_values_need_not_be_hashable() -> None:
    assert len(pairwise({"lengths": [[1, 2], [3]], "world": [1, 2]})) == 4


def test_one_axis_gives_each_value_once() -> None:
    assert pairwise({"world": [1, 2, 3]}) == [{"world": 1}, {"world": 2}, {"world": 3}]


@pytest.mark.parametrize("axes", [{}, {"a": []}, {"a": list(range(2000)), "b": list(range(2000))}])
def test_impossible_axes_are_refused(axes: dict[str, list]) -> None:
    with pytest.raises(ValueError, match="axis|exceeds"):
        pairwise(axes)


def test_drawn_cases_cover_the_same_pairs() -> None:
    def allowed(case: dict[str, Any]) -> bool:
        return not (case["layout"] == "striped" and case["world"] == 1)

    cases = drawn_pairwise(AXES, allowed)
    assert all(map(allowed, cases))
    assert _pairs(cases) == _pairs([case for case in _product(AXES) if allowed(case)])
    assert 48 <= len(cases) <= 66
    assert cases == drawn_pairwise(AXES, allowed)
    assert cases != drawn_pairwise(AXES, allowed, seed=1)


def test_drawn_cases_of_a_product_too_large_to_list() -> None:
    axes: dict[str, list] = {f"axis{i}": list(range(8)) for i in range(10)}
    cases = drawn_pairwise(axes, lambda case: True)
    assert len(_pairs(cases)) == 45 * 64
    assert 64 <= len(cases) <= 160

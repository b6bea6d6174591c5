"""Neighbourhood masks against NATTEN's definition, written per axis from its reference kernel."""

import itertools
from functools import reduce

import numpy as np
import pytest

from ringattn import masks

SHAPES = [(17,), (5, 7), (3, 4, 6)]


def _axis(n: int, window: int, dilation: int, stride: int, causal: bool) -> np.ndarray:
    """Allowed (query, key) coordinates of one axis.

    NATTEN's fused neighbourhood attention reference: coordinates of one dilation group attend each
    other; a query's window is that of its stride group's leader, clamped inside the grid.
    """
    allowed = np.zeros((n, n), dtype=bool)
    for i, j in itertools.product(range(n), repeat=2):
        if i % dilation != j % dilation:
            continue
        length = (n - i % dilation + dilation - 1) // dilation
        q, k = i // dilation, j // dilation
        if causal:
            leader = min(q // stride * stride + stride - 1, length - 1)
            allowed[i, j] = q >= k and leader - k < window
        else:
            left, right = window // 2, window // 2 + (window % 2 - 1)
            leader = min(q // stride * stride + stride // 2, length - 1)
            center = min(max(leader, left), length - 1 - right)
            allowed[i, j] = 0 <= center - k <= left or 0 <= k - center <= right
    return allowed


def _grid(*axes: np.ndarray) -> np.ndarray:
    return reduce(np.kron, axes).astype(bool)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_one_setting_for_all_axes(shape: tuple[int, ...], causal: bool) -> None:
    tried = 0
    for window, dilation, stride in itertools.product((1, 2, 3, 4, 5), (1, 2, 3), (1, 2, 3, 5)):
        if stride > window or any(window * dilation > n for n in shape):
            continue
        expected = _grid(*(_axis(n, window, dilation, stride, causal) for n in shape))
        mask = masks.neighborhood(shape, window, dilation, stride, causal)
        assert (mask.dense() == expected).all(), (window, dilation, stride)
        assert mask.area == expected.sum()
        tried += 1
    assert tried >= 5


def test_a_setting_per_axis() -> None:
    shape, window, dilation, stride, causal = (4, 9, 6), (2, 4, 3), (2, 2, 1), (1, 3, 2), (1, 0, 1)
    settings = zip(shape, window, dilation, stride, causal, strict=True)
    expected = _grid(*(_axis(n, w, d, s, bool(c)) for n, w, d, s, c in settings))
    mask = masks.neighborhood(shape, window, dilation, stride, [bool(c) for c in causal])
    assert (mask.dense() == expected).all()


def test_the_largest_window_sees_the_whole_grid() -> None:
    assert masks.neighborhood((5, 7), (5, 7)).area == 35 * 35
    assert masks.neighborhood((9,), 9, causal=True) == masks.causal(9)
    assert masks.neighborhood((1,), 1).area == 1


def test_stride_equal_to_the_window_is_blocked() -> None:
    block = np.kron(np.eye(3, dtype=bool), np.ones((4, 4), dtype=bool))
    assert (masks.neighborhood((12,), 4, stride=4).dense() == block).all()


@pytest.mark.parametrize(
    "shape, window, stride, tile",
    [
        ((8, 12), (4, 4), (4, 4), (4, 4)),
        ((8, 12), (6, 5), (4, 4), (2, 4)),
        ((4, 6, 8), (4, 3, 5), (2, 3, 4), (2, 3, 2)),
        ((12,), (6,), (4,), (2,)),
        ((4, 4), (4, 4), (1, 2), (1, 1)),
    ],
)
def test_tile_major_is_the_permuted_row_major_mask(
    shape: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], tile: tuple[int, ...]
) -> None:
    rank = len(shape)
    ids = np.arange(np.prod(shape)).reshape(
        [n for g, t in zip(shape, tile, strict=True) for n in (g // t, t)]
    )
    order = ids.transpose([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).ravel()
    plain = masks.neighborhood(shape, window, stride=stride)
    tiled = masks.neighborhood(shape, window, stride=stride, tile=tile)
    assert (tiled.dense() == plain.dense()[np.ix_(order, order)]).all()
    assert tiled.area == plain.area


def test_tile_major_needs_far_fewer_bands_in_3d() -> None:
    grid, window, stride = (8, 16, 16), (4, 8, 8), (4, 8, 8)
    plain = masks.neighborhood(grid, window, stride=stride)
    tiled = masks.neighborhood(grid, window, stride=stride, tile=(4, 8, 8))
    assert tiled.area == plain.area
    assert 100 * len(tiled.bands) < len(plain.bands)

"""Band tables against the dense matrix: area, tightening, overlap, on random bands."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.bands import OPEN, area, band_columns, dense, find_overlap, make_bands, tighten

S = 24
Row = tuple[int, int, int, int, int, int, int]


def _bound(sign: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(-S - 3, S + 3), st.just(sign * OPEN))


@st.composite
def bands(draw: st.DrawFn, most: int) -> list[Row]:
    def row() -> Row:
        q0, q1, k0, k1 = (draw(st.integers(0, S)) for _ in range(4))
        return q0, q1, k0, k1, draw(_bound(-1)), draw(_bound(1)), draw(st.integers(1, 7))

    return [row() for _ in range(draw(st.integers(1, most)))]


def _pairs(row: Row) -> np.ndarray:
    """The band's definition, pair by pair."""
    q0, q1, k0, k1, lo, hi, step = row
    allowed = np.zeros((S, S), dtype=bool)
    for i in range(q0, min(q1, S), step):
        for j in range(k0, min(k1, S), step):
            allowed[i, j] = lo <= j - i <= hi
    return allowed


@given(bands(most=4))
def test_dense_and_area_count_the_pairs(rows: list[Row]) -> None:
    table, expected = make_bands(rows), [_pairs(row) for row in rows]
    assert area(table).tolist() == [int(matrix.sum()) for matrix in expected]
    assert (dense(table, S) == np.logical_or.reduce(expected)).all()


@given(bands(most=4))
def test_tighten_keeps_the_pairs_and_leaves_no_idle_row(rows: list[Row]) -> None:
    tight, origin = tighten(make_bands(rows))
    kept = {int(index) for index in origin}
    for index, row in enumerate(rows):
        if index not in kept:
            assert not _pairs(row).any()
    for band, index in zip(tight, origin, strict=True):
        matrix = dense(np.array([band]), S)
        assert (matrix == _pairs(rows[index])).all()
        q = np.arange(band["q0"], band["q1"], band["step"])
        k = np.arange(band["k0"], band["k1"], band["step"])
        assert matrix[q].any(axis=1).all()
        assert matrix[:, k].any(axis=0).all()
        assert (q[-1] + 1, k[-1] + 1) == (band["q1"], band["k1"])
        assert max(abs(int(band["lo"])), abs(int(band["hi"]))) < 2 * S
        distances = np.subtract(*np.nonzero(matrix)[::-1])
        assert band["lo"] <= distances.min()
        assert band["hi"] >= distances.max()


@given(bands(most=4))
def test_tighten_changes_nothing_the_second_time(rows: list[Row]) -> None:
    tight, _ = tighten(make_bands(rows))
    again, origin = tighten(tight)
    assert (again == tight).all()
    assert origin.tolist() == list(range(len(tight)))


@given(bands(most=3))
def test_overlap_is_found_where_two_bands_share_a_pair(rows: list[Row]) -> None:
    tight, _ = tighten(make_bands(rows))
    matrices = [dense(np.array([band]), S) for band in tight]
    shared = {
        (a, b) for a in range(len(tight)) for b in range(a) if (matrices[a] & matrices[b]).any()
    }
    found = find_overlap(tight)
    assert (found is None) == (not shared)
    if found is not None:
        assert (max(found), min(found)) in shared


@pytest.mark.parametrize(
    "rows, together",
    [
        ([(0, 9, 0, 9, -OPEN, OPEN, 2), (1, 9, 1, 9, -OPEN, OPEN, 2)], False),
        ([(0, 9, 0, 9, -OPEN, OPEN, 2), (0, 9, 0, 9, -OPEN, OPEN, 3)], True),
        ([(0, 9, 0, 9, -OPEN, OPEN, 4), (2, 9, 2, 9, -OPEN, OPEN, 6)], True),
        ([(0, 9, 0, 9, -OPEN, -1, 1), (0, 9, 0, 9, 0, OPEN, 1)], False),
        ([(0, 9, 0, 5, -OPEN, OPEN, 1), (0, 9, 5, 9, -OPEN, OPEN, 1)], False),
        ([(0, 9, 0, 9, 0, 0, 1), (8, 9, 8, 9, -OPEN, OPEN, 1)], True),
    ],
)
def test_overlap_of_lattices_and_neighbours(rows: list[Row], together: bool) -> None:
    assert (find_overlap(make_bands(rows)) is not None) == together


def test_columns_are_broadcast() -> None:
    table = band_columns(np.array([0, 4]), np.array([4, 8]), 0, 8, hi=0)
    assert table["hi"].tolist() == [0, 0]
    assert table["lo"].tolist() == [-OPEN, -OPEN]
    assert table["step"].tolist() == [1, 1]

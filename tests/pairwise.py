"""Covering arrays: few cases in which every pair of values of two axes occurs together."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_PRODUCT = 1_000_000


def pairwise(
    axes: dict[str, list], allowed: Callable[[dict[str, Any]], bool] | None = None
) -> list[dict[str, Any]]:
    """Returns cases (axis name -> value) that cover every pair of values of any two axes.

    Greedy over the whole product and deterministic: each case is the first one that covers the
    most pairs still uncovered. With ``allowed``, cases for which it returns False are left out,
    and so are pairs that no allowed case contains. One axis gives one case per value. Raises
    ValueError for an empty axis or a product above a million cases.
    """
    if not axes or not all(axes.values()):
        raise ValueError(f"every axis needs a value: {axes}")
    if math.prod(len(values) for values in axes.values()) > MAX_PRODUCT:
        raise ValueError(f"product of {axes.keys()} exceeds {MAX_PRODUCT} cases")
    names = list(axes)
    index = np.array(list(itertools.product(*(range(len(v)) for v in axes.values()))))
    cases = [{n: axes[n][i] for n, i in zip(names, row, strict=True)} for row in index.tolist()]
    if allowed is not None:
        kept = np.array([bool(allowed(case)) for case in cases])
        index, cases = index[kept], [case for case, keep in zip(cases, kept, strict=True) if keep]
    chosen = _greedy_cover(_pair_ids(index, [len(v) for v in axes.values()]))
    return [cases[i] for i in chosen]


def _pair_ids(index: np.ndarray, sizes: list[int]) -> np.ndarray:
    """(cases, pairs of axes): the number of the value pair that a case has on a pair of axes."""
    if len(sizes) == 1:
        return index
    columns, offset = [], 0
    for a, b in itertools.combinations(range(len(sizes)), 2):
        columns.append(offset + index[:, a] * sizes[b] + index[:, b])
        offset += sizes[a] * sizes[b]
    return np.stack(columns, axis=1)


def _greedy_cover(pair_ids: np.ndarray) -> list[int]:
    """Rows that together contain every id, most new ids first, ties to the lower row."""
    uncovered = np.zeros(int(pair_ids.max(initial=-1)) + 1, dtype=bool)
    uncovered[pair_ids] = True
    chosen = []
    while uncovered.any():
        row = int(uncovered[pair_ids].sum(axis=1).argmax())
        chosen.append(row)
        uncovered[pair_ids[row]] = False
    return chosen

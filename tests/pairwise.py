"""Covering arrays: few cases in which every pair of values of two axes occurs together."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_PRODUCT = 1_000_000
ATTEMPTS = 40  # cases drawn for a pair before it counts as one that no allowed case contains


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


def drawn_pairwise(
    axes: dict[str, list], allowed: Callable[[dict[str, Any]], bool], seed: int = 0
) -> list[dict[str, Any]]:
    """As `pairwise`, for products of any size: cases are drawn instead of listed.

    Each case starts from a pair still uncovered and takes, axis by axis in random order, the value
    that covers most. Deterministic for a seed. A pair that `ATTEMPTS` draws put into no allowed
    case is left out.
    """
    rng = np.random.default_rng(seed)
    names = list(axes)
    open_pairs = {
        (a, i, b, j): None
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    cases = []
    while open_pairs:
        a, i, b, j = next(iter(open_pairs))
        for attempt in range(ATTEMPTS):
            chosen = _draw({a: i, b: j}, [len(v) for v in axes.values()], open_pairs, rng, attempt)
            case = {name: axes[name][index] for name, index in zip(names, chosen, strict=True)}
            if allowed(case):
                cases.append(case)
                break
        else:
            chosen = []
            del open_pairs[a, i, b, j]
        for (x, m), (y, n) in itertools.combinations(enumerate(chosen), 2):
            open_pairs.pop((x, m, y, n), None)
    return cases


def _draw(
    fixed: dict[int, int],
    sizes: list[int],
    open_pairs: dict[tuple[int, int, int, int], None],
    rng: np.random.Generator,
    attempt: int,
) -> list[int]:
    """A case with the fixed values; later attempts leave more of the other values to chance."""
    chosen = dict(fixed)
    for axis in rng.permutation([x for x in range(len(sizes)) if x not in fixed]).tolist():
        values = rng.permutation(sizes[axis]).tolist()
        if rng.random() >= attempt / ATTEMPTS:
            values.sort(key=lambda value: -_gain(axis, value, chosen, open_pairs))
        chosen[axis] = values[0]
    return [chosen[axis] for axis in range(len(sizes))]


def _gain(
    axis: int, value: int, chosen: dict[int, int], open_pairs: dict[tuple[int, int, int, int], None]
) -> int:
    """Open pairs that a value of an axis closes with those chosen."""
    pairs = ((x, m, axis, value) if x < axis else (axis, value, x, m) for x, m in chosen.items())
    return sum(pair in open_pairs for pair in pairs)

"""Grouped-query heads: which key heads a range of query heads reads."""

from collections.abc import Iterator


def head_parts(h0: int, h1: int, group: int) -> Iterator[tuple[slice, slice]]:
    """Cuts query heads [h0, h1) so that each part is a plain grouped-query problem.

    `group` query heads share one key head. Yields (query heads, key heads) slices: whole groups
    together, and each incomplete group at either end on its own with its one key head.
    """
    first, last = -(-h0 // group), h1 // group
    if first > last:  # strictly inside one group
        yield slice(h0, h1), slice(last, last + 1)
        return
    if h0 < first * group:
        yield slice(h0, first * group), slice(first - 1, first)
    if first < last:
        yield slice(first * group, last * group), slice(first, last)
    if last * group < h1:
        yield slice(last * group, h1), slice(last, last + 1)

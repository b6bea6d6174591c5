"""Grouped-query heads: which key heads a range of query heads reads; taking a few at once."""

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


def head_windows(heads: int, key_heads: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cuts all heads into (query heads, key heads) windows of at most `limit` >= 1 key heads."""
    group = heads // key_heads
    for start in range(0, key_heads, limit):
        stop = min(start + limit, key_heads)
        yield slice(start * group, stop * group), slice(start, stop)

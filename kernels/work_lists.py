"""Work items as the device takes them: in order, longest first, with short runs written out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ringattn.kernels.triton_configs import BlockConfig
from ringattn.kernels.work_items import Items, column_visits, expand

FEW_WORKS = 1024
"""Up to so many programs all run at about the same time, and the longest start first. Beyond, those
of one head stay together, so that they find its keys in the cache; longest first within."""

SHORT_RUN, MOST_ENTRIES = 8, 1 << 22
"""Runs of fewer blocks are written out, unless that makes a larger table."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WorkList:
    """One launch. Tensors int32 on the device; columns as in `ringattn.kernels.triton_forward`.

    Attributes:
        config: block sizes that the items were made for.
        step: distance between neighbouring rows.
        works: (n, 4) item, query heads h0 and h1, and the first list of its heads.
        items: (m, 4). refs: (r, 6). ranges: (lists, m, 2) of entries. entries: (e, 3).
        listed: whether columns come from entries.
        range_batch: lists between batch rows; 0 where all share them.
    """

    config: BlockConfig
    step: int
    works: torch.Tensor
    items: torch.Tensor
    refs: torch.Tensor
    ranges: torch.Tensor
    entries: torch.Tensor
    listed: bool
    range_batch: int = 0


Heads = Callable[[int, int], list[tuple[int, int]]]


def single_heads(h0: int, h1: int) -> list[tuple[int, int]]:
    """One program per query head."""
    return [(h, h + 1) for h in range(h0, h1)]


def head_groups(group: int) -> Heads:
    """One program per key head: the query heads that share it."""

    def split(h0: int, h1: int) -> list[tuple[int, int]]:
        return [(max(h, h0), min(h + group, h1)) for h in range(h0 // group * group, h1, group)]

    return split


def ordered_works(items: Items, heads: Heads) -> np.ndarray:
    """int32 (n, 4): programs in the order in which they start."""
    parts = []
    for h0, h1 in np.unique(items.heads, axis=0).tolist():
        mine = np.flatnonzero((items.heads == (h0, h1)).all(axis=1))
        split = np.array(heads(h0, h1), dtype=np.int32)
        works = np.zeros((len(mine) * len(split), 4), dtype=np.int32)
        works[:, 0] = np.tile(mine, len(split))
        works[:, 1:3] = np.repeat(split, len(mine), axis=0)
        parts.append(works)
    works = np.concatenate(parts)
    longest = -items.cost[works[:, 0]]
    by_head = works[:, 1] if len(works) > FEW_WORKS else np.zeros(len(works))
    return works[np.lexsort((longest, by_head))]


def work_list(
    items: Items, works: np.ndarray, config: BlockConfig, device: torch.device, *, listed: bool
) -> WorkList:
    """The items with their programs, on the device."""
    ranges, entries = np.zeros((1, 2), dtype=np.int32), np.zeros((1, 3), dtype=np.int32)
    if listed:
        ranges, entries = written_out(items, config.rows, config.columns)
    return WorkList(
        config=config,
        step=items.step,
        works=on_device(works, device),
        items=on_device(items.items, device),
        refs=on_device(items.refs, device),
        ranges=on_device(ranges, device),
        entries=on_device(entries, device),
        listed=listed,
    )


def on_device(table: np.ndarray, device: torch.device) -> torch.Tensor:
    """A table as a tensor; the host waits for its copy."""
    return torch.from_numpy(np.ascontiguousarray(table)).to(device)


def are_short(items: Items) -> bool:
    """Whether items have several runs, most of them short."""
    count, blocks = len(items.refs), int(items.cost.sum())
    many = (items.items[:, 3] - items.items[:, 2]).mean() > 2
    return bool(many) and blocks < SHORT_RUN * count and blocks < MOST_ENTRIES


def written_out(items: Items, row_block: int, column_block: int) -> tuple[np.ndarray, np.ndarray]:
    """(ranges, entries): the column blocks of every item; int32 (items, 2) and (entries, 3).

    An entry is its first column, the end of its columns, and the ref to mask by or -1. Items of
    fewer than `row_block` rows are always masked: rows of other items follow theirs.
    """
    owner, within = expand(items.items[:, 3] - items.items[:, 2])
    ref = items.items[owner, 2] + within
    row, rows = items.items[owner, 0].astype(np.int64), items.items[owner, 1].astype(np.int64)
    begin, end = column_visits(items.refs[ref], row, rows, items.step)
    pitch = items.step * column_block
    count = np.maximum(-(-(end - begin) // pitch), 0)
    visit, number = expand(count)
    start = begin[visit] + number * pitch
    r0, r1, _, c1, lo, hi = items.refs[ref].astype(np.int64)[visit].T
    row, row_last = row[visit], (row + (rows - 1) * items.step)[visit]
    column_last = start + pitch - items.step
    full = (r0 <= row) & (r1 > row_last) & (start >= row_last + lo)
    full &= rows[visit] == row_block
    full &= column_last <= np.minimum(c1 - 1, row + hi)
    entries = np.stack([start, end[visit], np.where(full, -1, ref[visit])], axis=1)
    stop = np.cumsum(np.bincount(owner[visit], minlength=len(items.items)))
    ranges = np.stack([np.concatenate([[0], stop[:-1]]), stop], axis=1)
    return ranges.astype(np.int32), entries.astype(np.int32)

"""Work lists of blocks chosen at run time, made on the device: nobody waits for it.

What rows are cut into is known beforehand, as is where each block of columns lies in the buffer;
which blocks an item visits is gathered from the selection, and put in front by a stable sort. Tiles
that share rows are launches of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ringattn.kernels.block_matrix import BlockTiles, Selection, Span, spans
from ringattn.kernels.triton_configs import BlockConfig
from ringattn.kernels.work_items import LIMIT, Items
from ringattn.kernels.work_lists import (
    Heads,
    WorkList,
    head_groups,
    on_device,
    ordered_works,
    single_heads,
)


@dataclass(frozen=True, eq=False)
class RoutedItems:
    """The items of tiles that share no rows.

    Attributes:
        items: as in `Items`; an item's refs are its one tile.
        block: int64 (items,): block of the matrix that holds the item's rows.
        tile: int64 (items,): the item's tile. model_head: int64 (tiles,): model's head of head 0.
        spans: int64 (tiles, most, 3): first row, end, block of the columns' spans, or (0, 0, -1).
        blocks: blocks of the columns' side. row_block: most rows of an item.
        by_queries: whether rows are query rows.
        placed: copies on devices, made when first asked for: a copy waits for the device.
    """

    items: Items
    block: np.ndarray
    tile: np.ndarray
    model_head: np.ndarray
    spans: np.ndarray
    blocks: int
    row_block: int
    by_queries: bool
    placed: dict[Any, Any] = field(default_factory=dict)

    def on(self, device: torch.device) -> "_Placed":
        """The tables on a device."""
        if device not in self.placed:
            tables = (self.items.items, self.items.refs, self.block, self.tile, self.spans)
            self.placed[device] = _Placed(*(on_device(table, device) for table in tables))
        return self.placed[device]


@dataclass(frozen=True)
class _Placed:
    """As in `RoutedItems`."""

    items: torch.Tensor
    refs: torch.Tensor
    block: torch.Tensor
    tile: torch.Tensor
    spans: torch.Tensor


def routed_items(tiles: BlockTiles, row_block: int, *, by_queries: bool) -> list[RoutedItems]:
    """The items of each launch."""
    return [_items(tiles, layer, row_block, by_queries) for layer in _layers(tiles, by_queries)]


def _layers(tiles: BlockTiles, by_queries: bool) -> list[np.ndarray]:
    """Tile numbers, so that the tiles of a layer share no rows of a head, or key head."""
    a, b = ("q0", "q1") if by_queries else ("k0", "k1")
    table = tiles.tiles
    meet = (table[a][:, None] < table[b]) & (table[b][:, None] > table[a])
    if by_queries:
        meet &= (table["h0"][:, None] < table["h1"]) & (table["h1"][:, None] > table["h0"])
    layer = np.zeros(len(table), dtype=np.int64)
    for i in range(1, len(table)):
        taken = set(layer[:i][meet[i, :i]].tolist())
        layer[i] = next(n for n in range(i + 1) if n not in taken)
    return [np.flatnonzero(layer == n) for n in range(int(layer.max()) + 1)]


def _items(tiles: BlockTiles, layer: np.ndarray, row_block: int, by_queries: bool) -> RoutedItems:
    rows, heads, refs, block, owner, columns, model_head = [], [], [], [], [], [], []
    for number, index in enumerate(layer):
        tile, matrix = tiles.tiles[index], tiles.matrices[tiles.tiles[index]["matrix"]]
        sides = [
            spans(
                edges,
                int(tile[f"{a}_token"]),
                int(tile["pitch"]),
                int(tile[f"{a}0"]),
                int(tile[f"{a}1"]),
            )
            for a, edges in (("q", matrix.q_edges), ("k", matrix.k_edges))
        ]
        mine, others = sides if by_queries else sides[::-1]
        for first, count, of in _pieces(mine, row_block):
            rows.append((first, count, number, number + 1))
            block.append(of)
            owner.append(number)
            heads.append((int(tile["h0"]), int(tile["h1"])))
        lo, hi = (tile["lo"], tile["hi"]) if by_queries else (-tile["hi"], -tile["lo"])
        names = ("q0", "q1", "k0", "k1") if by_queries else ("k0", "k1", "q0", "q1")
        refs.append((*(tile[name] for name in names), lo, hi))
        columns.append(others)
        model_head.append(int(tile["head"] - tile["h0"]))
    items = np.array(rows, dtype=np.int32)
    table = np.clip(np.array(refs, dtype=np.int64), -LIMIT, LIMIT).astype(np.int32)
    made = Items(1, items, table, np.array(heads, dtype=np.int32), items[:, 1].astype(np.int64))
    most = max(len(others) for others in columns)
    padded = np.tile(np.array([0, 0, -1]), (len(columns), most, 1))
    for number, others in enumerate(columns):
        padded[number, : len(others)] = [(s.first, s.last, s.block) for s in others]
    matrices = [tiles.matrices[n] for n in tiles.tiles["matrix"][layer]]
    blocks = max(len(m.k_edges if by_queries else m.q_edges) for m in matrices) - 1
    return RoutedItems(
        items=made,
        block=np.array(block),
        tile=np.array(owner),
        model_head=np.array(model_head),
        spans=padded,
        blocks=blocks,
        row_block=row_block,
        by_queries=by_queries,
    )


def _pieces(held: list[Span], most: int) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, block) of spans in blocks of at most `most` rows."""
    for span in held:
        for first in range(span.first, span.last, most):
            yield first, min(most, span.last - first), span.block


def chosen_entries(
    routed: RoutedItems, selection: Selection, column_block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ranges, entries) of every batch row, selecting head and item, on the selection's device.

    int32 (B * selecting heads, items, 2) and (e, 3), as in `ringattn.kernels.work_lists`.
    """
    device = selection.blocks.device
    placed = routed.on(device)
    first, end, chosen = _visited(routed, selection)
    length = (routed.spans[..., 1] - routed.spans[..., 0]).max(initial=0)
    chunks = -(-int(length) // column_block)
    start = first.unsqueeze(-1) + column_block * torch.arange(chunks, device=device)
    end = end.unsqueeze(-1).expand_as(start)
    row, count = placed.items[:, 0].long(), placed.items[:, 1].long()
    tile, refs = placed.tile, placed.refs.long()[placed.tile]
    view = (-1, 1, 1)
    lo, hi, last = refs[:, 4], refs[:, 5], row + count - 1
    valid = chosen.unsqueeze(-1) & (start < end)
    valid &= (start <= (last + hi).view(view)) & (start + column_block > (row + lo).view(view))
    whole = (start + column_block <= end) & (count == routed.row_block).view(view)
    whole = whole & (start >= (last + lo).view(view))
    whole &= start + column_block - 1 <= (row + hi).view(view)
    shape = (*valid.shape[:3], -1)
    order = (~valid).reshape(shape).to(torch.uint8).argsort(dim=-1, stable=True)
    parts = (start, end, torch.where(whole, -1, tile.view(view)))
    entries = [part.expand_as(valid).reshape(shape).gather(-1, order) for part in parts]
    width = order.shape[-1]
    held = valid.reshape(shape).sum(-1)
    base = torch.arange(held.numel(), device=device).view(held.shape) * width
    ranges = torch.stack([base, base + held], dim=-1).flatten(0, 1)
    return ranges.int(), torch.stack(entries, dim=-1).view(-1, 3).int()


def _visited(
    routed: RoutedItems, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first, end, chosen) of candidate spans: (B, selecting heads, items, candidates)."""
    device, chosen = selection.blocks.device, selection.blocks.long()
    placed = routed.on(device)
    block, tile, held = placed.block, placed.tile, placed.spans
    if routed.by_queries:  # the candidates are the chosen blocks: where do they lie in the buffer?
        bounds = held.new_zeros((len(held), routed.blocks + 1, 2))
        at = torch.where(held[..., 2] < 0, routed.blocks, held[..., 2])
        bounds.scatter_(1, at.unsqueeze(-1).expand(-1, -1, 2), held[..., :2])
        bounds[:, routed.blocks] = 0
        picked = chosen[:, :, block]
        picked = torch.where(picked < 0, routed.blocks, picked)
        where = bounds[tile.view(1, 1, -1, 1), picked]
        return where[..., 0], where[..., 1], where[..., 1] > where[..., 0]
    # the candidates are the query spans in the buffer: did their blocks choose the item's block?
    keys = int(routed.block.max(initial=0)) + 1
    wanted = torch.where((chosen < 0) | (chosen >= keys), keys, chosen)
    table = torch.zeros((*chosen.shape[:3], keys + 1), dtype=torch.bool, device=device)
    table.scatter_(3, wanted, True)
    spans_of_item = held[tile]
    of = spans_of_item[..., 2]
    hit = table[:, :, of.clamp_min(0), block.unsqueeze(-1)] & (of >= 0)
    first, end = (spans_of_item[..., n].expand(hit.shape) for n in (0, 1))
    return first, end, hit


def routed_work(
    routed: RoutedItems,
    selection: Selection,
    config: BlockConfig,
    group: int,
    *,
    deterministic: bool,
) -> list[tuple[WorkList, bool]]:
    """Launches of one layer, and whether their programs share rows of dk and dv."""
    ranges, entries = chosen_entries(routed, selection, config.columns)
    device = ranges.device
    placed = routed.on(device)
    lists = selection.blocks.shape[1] * len(routed.items.items)
    key = (device, lists, selection.q_heads, group, deterministic)
    if key not in routed.placed:
        share = selection.q_heads // selection.blocks.shape[1]
        rounds, shared = _rounds(routed, share, group, deterministic=deterministic)
        routed.placed[key] = [on_device(mine, device) for mine in rounds], shared
    rounds, shared = routed.placed[key]
    return [
        (
            WorkList(
                config=config,
                step=1,
                works=mine,
                items=placed.items,
                refs=placed.refs,
                ranges=ranges,
                entries=entries,
                listed=True,
                range_batch=lists,
            ),
            shared,
        )
        for mine in rounds
    ]


def _rounds(
    routed: RoutedItems, share: int, group: int, *, deterministic: bool
) -> tuple[list[np.ndarray], bool]:
    """Programs of each launch, and whether they share rows; `share` heads select together."""
    heads = single_heads if routed.by_queries else _selecting_parts(routed, share, group)
    works = ordered_works(routed.items, heads)
    tile = routed.tile[works[:, 0]]
    works[:, 3] = (works[:, 1] + routed.model_head[tile]) // share * len(routed.items.items)
    if routed.by_queries:
        return [works], False
    part = _turn(works, group)
    if part.any() and not deterministic:
        return [works], True
    return [works[part == n] for n in range(int(part.max()) + 1)], False


def _selecting_parts(routed: RoutedItems, share: int, group: int) -> Heads:
    """Heads that share a key head and, in every tile, a selecting head."""
    shifts = np.unique(routed.model_head).tolist()

    def split(h0: int, h1: int) -> list[tuple[int, int]]:
        parts = head_groups(group)(h0, h1)
        for shift in shifts:
            cut = (head_groups(share)(a + shift, b + shift) for a, b in parts)
            parts = [(a - shift, b - shift) for found in cut for a, b in found]
        return parts

    return split


def _turn(works: np.ndarray, group: int) -> np.ndarray:
    """Which programs of equal rows and key head come first, second, …; int64 (works,)."""
    key = np.stack([works[:, 0], works[:, 1] // group], axis=1)
    order = np.lexsort((works[:, 1], key[:, 1], key[:, 0]))
    fresh = np.concatenate([[True], (np.diff(key[order], axis=0) != 0).any(axis=1)])
    position = np.arange(len(works))
    turn = np.empty(len(works), dtype=np.int64)
    turn[order] = position - np.maximum.accumulate(np.where(fresh, position, 0))
    return turn

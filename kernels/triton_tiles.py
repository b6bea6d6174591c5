"""Prepared tiles of the band kernel: work lists by block sizes, made when first asked for."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ringattn.kernels.block_matrix import BlockTiles
from ringattn.kernels.routed_lists import RoutedItems, routed_items
from ringattn.kernels.triton_configs import BlockConfig
from ringattn.kernels.work_items import Items, by_step, head_segments, step_items, transposed
from ringattn.kernels.work_lists import (
    WorkList,
    are_short,
    head_groups,
    ordered_works,
    single_heads,
    work_list,
)

Configs = tuple[BlockConfig, BlockConfig]


@dataclass(frozen=True, eq=False)
class TritonTiles:
    """A tile list, and its work lists by block sizes, made when they are first asked for."""

    bands: np.ndarray
    routed: BlockTiles | None
    device: torch.device
    lists: dict[Any, Any] = field(default_factory=dict)

    def queries(self, configs: Configs) -> list[WorkList]:
        """Work lists over query rows; `configs` for columns in runs, and listed."""
        key = ("queries", configs)
        if key not in self.lists:
            self.lists[key] = [
                work_list(
                    items, ordered_works(items, single_heads), config, self.device, listed=listed
                )
                for items, config, listed in _items(self.bands, configs)
            ]
        return self.lists[key]

    def routed_items(self, rows: int, *, by_queries: bool) -> list[RoutedItems]:
        """The items of run-time blocks."""
        if self.routed is None:
            return []
        key = ("routed", rows, by_queries)
        if key not in self.lists:
            self.lists[key] = routed_items(self.routed, rows, by_queries=by_queries)
        return self.lists[key]

    def keys(
        self, configs: Configs, group: int, few: int, deterministic: bool
    ) -> list[tuple[WorkList, bool]]:
        """Work lists over key rows, and whether their programs share rows of dk and dv.

        Below `few` programs, every query head is one of its own. A deterministic list shares none:
        where heads of one group have unequal tiles, they take their turns.
        """
        key = ("keys", configs, group, few, deterministic)
        if key not in self.lists:
            self.lists[key] = self._keys(configs, group, few, deterministic)
        return self.lists[key]

    def _keys(
        self, configs: Configs, group: int, few: int, deterministic: bool
    ) -> list[tuple[WorkList, bool]]:
        tiles = transposed(self.bands)
        apart = bool(((tiles["h0"] % group) | (tiles["h1"] % group)).any())
        tables = list(head_segments(tiles)) if apart and deterministic else [tiles]
        result = []
        for table in tables:
            for items, config, listed in _items(table, configs):
                works = ordered_works(items, head_groups(group))
                split = group > 1 and len(works) < few and not deterministic
                if split:
                    works = ordered_works(items, single_heads)
                made = work_list(items, works, config, self.device, listed=listed)
                result.append((made, split or (apart and not deterministic)))
        return result


def _items(tiles: np.ndarray, configs: Configs) -> Iterator[tuple[Items, BlockConfig, bool]]:
    """The items of each launch, their block sizes, and whether their columns are listed."""
    runs, listed = configs
    for mine in by_step(tiles):
        items = step_items(mine, runs.rows, runs.columns)
        short = are_short(items)
        if short and listed != runs:
            items = step_items(mine, listed.rows, listed.columns)
        yield items, listed if short else runs, short

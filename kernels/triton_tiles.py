"""Prepared tiles of the band kernel: work lists by block sizes, made when first asked for."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ringattn.kernels.block_matrix import BlockTiles
from ringattn.kernels.routed_lists import RoutedItems, routed_items
from ringattn.kernels.triton_configs import BlockConfig
from ringattn.kernels.work_items import build_items, head_segments, transposed
from ringattn.kernels.work_lists import (
    WorkList,
    head_groups,
    ordered_works,
    single_heads,
    work_list,
)


@dataclass(frozen=True, eq=False)
class TritonTiles:
    """A tile list, and its work lists by block sizes, made when they are first asked for."""

    bands: np.ndarray
    routed: BlockTiles | None
    device: torch.device
    lists: dict[Any, Any] = field(default_factory=dict)

    def queries(self, config: BlockConfig) -> list[WorkList]:
        """Work lists over query rows."""
        key = ("queries", config.rows, config.columns)
        if key not in self.lists:
            self.lists[key] = [
                work_list(
                    items,
                    ordered_works(items, single_heads),
                    (config.rows, config.columns),
                    self.device,
                )
                for items in build_items(self.bands, config.rows, config.columns)
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
        self, config: BlockConfig, group: int, few: int, deterministic: bool
    ) -> list[tuple[WorkList, bool]]:
        """Work lists over key rows, and whether their programs share rows of dk and dv.

        Below `few` programs, every query head is one of its own. A deterministic list shares none:
        where heads of one group have unequal tiles, they take their turns.
        """
        key = ("keys", config.rows, config.columns, group, few, deterministic)
        if key not in self.lists:
            self.lists[key] = self._keys(config, group, few, deterministic)
        return self.lists[key]

    def _keys(
        self, config: BlockConfig, group: int, few: int, deterministic: bool
    ) -> list[tuple[WorkList, bool]]:
        tiles = transposed(self.bands)
        apart = bool(((tiles["h0"] % group) | (tiles["h1"] % group)).any())
        tables = list(head_segments(tiles)) if apart and deterministic else [tiles]
        result = []
        for table in tables:
            for items in build_items(table, config.rows, config.columns):
                works = ordered_works(items, head_groups(group))
                split = group > 1 and len(works) < few and not deterministic
                if split:
                    works = ordered_works(items, single_heads)
                made = work_list(items, works, (config.rows, config.columns), self.device)
                result.append((made, split or (apart and not deterministic)))
        return result

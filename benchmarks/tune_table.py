"""Reads and writes the shipped table of block sizes, one kernel per line."""

import json
from collections.abc import Mapping
from pathlib import Path

from ringattn.benchmarks.tune_cases import Entry
from ringattn.errors import UserError
from ringattn.kernels.triton_configs import LISTED, BlockConfig

Table = dict[str, dict[str, dict[str, list]]]
"""By architecture, kernel and head dim: rows, columns, warps, stages, and true for TMA."""


def read_table(path: Path) -> Table:
    """The table of a file. Raises UserError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(str(path), f"is not a table of block sizes: {error}", "name one") from None


def merged(table: Table, arch: str, best: Mapping[Entry, BlockConfig]) -> Table:
    """The table with the best configurations of an architecture; all other entries are kept.

    An architecture that it lacks starts as a copy of "default", so that it is whole. Where listed
    columns had no sizes of their own, they keep those that were changed for columns in runs.
    """
    made: Table = json.loads(json.dumps(table))
    kernels = made.setdefault(arch, json.loads(json.dumps(table["default"])))
    for entry, config in best.items():
        dim = str(entry.head_dim)
        if not entry.listed and kernels[entry.name][dim] != as_list(config):
            listed = kernels.setdefault(entry.name + LISTED, {})
            listed.setdefault(dim, kernels[entry.name][dim])
        kernels.setdefault(entry.name, {})[dim] = as_list(config)
    return made


def as_list(config: BlockConfig) -> list:
    """A configuration as the table writes it."""
    sizes = [config.rows, config.columns, config.warps, config.stages]
    return [*sizes, True] if config.tma else sizes


def table_text(table: Table) -> str:
    """The file's text."""
    blocks = []
    for arch, kernels in table.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(dims)}" for name, dims in kernels.items()]
        blocks.append(f"  {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"

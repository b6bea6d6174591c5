"""Tables of names: what published results call a GPU, a model, a method, a way to checkpoint.

Tables are YAML lists in `configs/calibration`; the first entry whose pattern is found in a name
counts, and the last entry of each matches every name, so that nothing is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from ringattn.cost import Cluster
from ringattn.errors import UserError

GIB = 2**30


@lru_cache(maxsize=16)
def table(name: str) -> tuple[Mapping[str, Any], ...]:
    """The entries of `configs/calibration/NAME.yaml`."""
    source = resources.files("ringattn.configs") / "calibration" / f"{name}.yaml"
    entries = yaml.safe_load(source.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"calibration table {name}", "must be a list of mappings", "repair it")
    return tuple(entries)


@lru_cache(maxsize=1024)
def entry_for(name: str, text: str) -> Mapping[str, Any]:
    """The first entry of a table whose pattern is found in a text."""
    plain = re.sub(r"[\s_]+", "-", text.strip().lower())
    for entry in table(name):
        if re.search(entry["match"], plain) or re.search(entry["match"], text.lower()):
            return entry
    raise UserError(f"calibration table {name}", "has no last entry", "add one that matches all")


def is_known(name: str, text: str) -> bool:
    """Whether a table has an entry for a text that does not match every name."""
    return entry_for(name, text)["match"] != ""


def hardware(text: str, base: Cluster, node: int) -> Cluster:
    """The cluster that a hardware name stands for.

    Args:
        text: the name. base: the cluster of `base_name`, with one kernel.
        node: ranks of a group that share a node, and that node's share of the NICs.
    """
    entry = entry_for("hardware", text)
    peak = float(entry.get("peak_tflops", base.peak_tflops))
    ratio = peak / base.peak_tflops * clock(text)
    kernels = {
        name: replace(
            kernel,
            forward=replace(kernel.forward, tflops=kernel.forward.tflops * ratio),
            backward=replace(kernel.backward, tflops=kernel.backward.tflops * ratio),
        )
        for name, kernel in base.kernels.items()
    }
    return replace(
        base,
        peak_tflops=peak,
        ranks_per_node=node,
        nics_per_node=max(1, base.nics_per_node * node // base.ranks_per_node),
        memory_gib=memory_gib(text, base),
        memory_gbs=float(entry.get("memory_gbs", base.memory_gbs)),
        intra=replace(base.intra, gbs=float(entry.get("intra_gbs", base.intra.gbs))),
        inter=replace(base.inter, gbs=float(entry.get("inter_gbs", base.inter.gbs))),
        overlap_tax=float(entry.get("overlap_tax", base.overlap_tax)),
        kernels=kernels,
    )


def clock(text: str) -> float:
    """Share of the usual clock that a GPU of that name sustains."""
    return float(entry_for("hardware", text).get("clock", 1.0))


def base_name(text: str) -> str:
    """Name of the cluster file that stands for a hardware name."""
    return str(entry_for("hardware", text)["like"])


def memory_gib(text: str, base: Cluster) -> float:
    """Memory of one GPU: as its name says, else as the tables do."""
    entry = entry_for("hardware", text)
    named = re.search(r"(\d+)\s*gb", text.lower())
    known = float(named.group(1)) if named else base.memory_gib
    return float(entry.get("memory_gib", known))


def same_hardware(text: str) -> str:
    """What rows share that were measured on the same kind of GPU: spelling does not matter."""
    entry = entry_for("hardware", text)
    return str(entry["like"]) + ("" if entry["known"] == "fitted" else f"~{entry['match']}")

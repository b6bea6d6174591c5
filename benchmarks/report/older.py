"""Records of the older scripts, with the keys of the suites.

``kernels``, ``measured_methods`` and ``method_table`` say what the suites kernels, masks and
methods say. Records of all other names stay what they are and get plain tables.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ringattn.benchmarks.record import Record
from ringattn.benchmarks.report.cells import SUITES, Cell
from ringattn.layouts import NAMES as LAYOUTS

_TOKENS_PER_RANK = 8192  # of method_table
_END = r"-(?P<method>.+?)-(?P<cluster>[^-]+)-(?P<ranks>\d{1,6})$"
_CASE = re.compile(r"(?P<mask>.+)" + _END.replace(".+?", "[^-]+"))
_LAYOUT_CASE = re.compile(rf"(?P<mask>.+?)-(?P<layout>(?:{'|'.join(LAYOUTS)})[^-]*)" + _END)


def cell_of(record: Record) -> Cell:
    """The record as a cell of its suite."""
    suite = record.name.removeprefix("bench.")
    if record.name.startswith("bench.") and suite in SUITES:
        config, figures = record.config, record.figures
    elif record.name in _READERS:
        suite, read = _READERS[record.name]
        config, figures = read(record)
    else:
        return Cell(suite=record.name, record=record, config=record.config, figures=record.figures)
    return Cell(suite=suite, record=record, config=config, figures=figures)


def _kernels(record: Record) -> tuple[dict[str, Any], dict[str, float | None]]:
    config = dict(record.config)
    dims = config.get("head_dim")
    if isinstance(dims, list) and len(set(dims)) == 1:
        config["head_dim"] = dims[0]
    milliseconds = config.get("ms")
    figures = _errors(config) | {
        "peak_bytes": config.get("peak_bytes"),
        "seconds": milliseconds / 1e3 if isinstance(milliseconds, int | float) else None,
    }
    return config | {"ranks": 1}, figures


def _measured(record: Record) -> tuple[dict[str, Any], dict[str, float | None]]:
    config = dict(record.config) | {"direction": "both"}
    config["layout"] = config.get("how") if config.get("contender") == "ringattn" else None
    config["quantity"] = "CPU seconds of all ranks"
    words = record.case.split("-")
    if config.get("ranks") and f"p{config['ranks']}" in words:
        config["dtype"] = words[words.index(f"p{config['ranks']}") - 1]
    sent = config.get("sent_bytes")
    figures = _errors(config) | {
        "cpu_seconds": record.value,
        "seconds": config.get("wall_s"),
        "wire_bytes": max(sent) if isinstance(sent, list) and sent else None,
    }
    return config, figures


def _table(record: Record) -> tuple[dict[str, Any], dict[str, float | None]]:
    old = record.config
    words = _LAYOUT_CASE.match(record.case) or _CASE.match(record.case)
    found = words.groupdict() if words else {"mask": record.case, "method": "", "ranks": "1"}
    ranks = int(found["ranks"])
    config = {
        "mask": found["mask"],
        "seq_len": _TOKENS_PER_RANK * ranks,
        "method": found["method"],
        "layout": found.get("layout") or old.get("layout"),
        "ranks": ranks,
        "heads": [64, 8],
        "head_dim": 128,
        "dtype": "bfloat16",
        "direction": "both",
        "kernel": old.get("kernel"),
        "cluster": found.get("cluster"),
        "simulated": True,
    }
    milliseconds = [old.get("forward_ms"), old.get("backward_ms")]
    gigabytes = [old.get("intra_gb_max"), old.get("inter_gb_max")]
    figures: dict[str, float | None] = {
        "seconds": _sum(milliseconds, 1e-3),
        "wire_bytes": _sum(gigabytes, 1e9),
        "peak_bytes": _sum([old.get("peak_gb")], 1e9),
    }
    return config, figures


def _sum(values: list[Any], factor: float) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return factor * sum(numbers) if len(numbers) == len(values) else None


def _errors(config: Mapping[str, Any]) -> dict[str, float | None]:
    errors = config.get("errors")
    if not isinstance(errors, dict):
        return {}
    return {f"error_{k}": v for k, v in errors.items() if isinstance(v, int | float)}


_Reader = Callable[[Record], tuple[dict[str, Any], dict[str, float | None]]]
_READERS: Mapping[str, tuple[str, _Reader]] = {
    "kernels": ("kernels", _kernels),
    "measured_methods": ("masks", _measured),
    "method_table": ("methods", _table),
}

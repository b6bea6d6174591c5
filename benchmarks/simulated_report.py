"""How far predictions lie from measured runs: tables over the records of `simulated_runs`."""

import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ringattn.benchmarks.record import Record

NAME = "bench.simulated"
BAR = 0.15
"""Median relative error that is allowed."""


def relative_errors(record: Record) -> tuple[float, float]:
    """Signed relative errors of the slowest rank's time and of the busiest one's CPU time."""
    f = record.figures
    return tuple(
        (f[f"predicted_{name}"] or 0.0) / (f[name] or 1.0) - 1.0
        for name in ("seconds", "cpu_seconds")
    )  # type: ignore[return-value]


def error_table(records: Iterable[Record]) -> list[str]:
    """Lines of a Markdown table: median absolute errors overall, per ranks, method and mask, and
    what was not measured. The bias is the median signed error."""
    mine = [r for r in records if r.name == NAME]
    good = [r for r in mine if r.status == "ok"]
    lines = [f"{len(good)} cells measured, {len(mine) - len(good)} refused or failed"]
    if not good:
        return lines
    lines += [
        "",
        "| | cells | time: median error | bias | p90 | CPU time: median error | bias | p90 |",
        "|---|---|---|---|---|---|---|---|",
        _row("all", good),
    ]
    for key in ("ranks", "method", "mask"):
        lines += _rows(key, good, lambda record, key=key: str(record.config[key]))
    lines += ["", f"Bar: median error of the time at most {BAR:.0%}."]
    return lines


def _rows(key: str, records: Sequence[Record], value: Callable[[Record], str]) -> list[str]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(value(record), []).append(record)
    return [_row(f"{key} {name}", group) for name, group in groups.items()]


def _row(name: str, records: Sequence[Record]) -> str:
    cells = [name, str(len(records))]
    for errors in zip(*map(relative_errors, records), strict=True):
        sizes = sorted(abs(error) for error in errors)
        cells += [
            f"{statistics.median(sizes):.1%}",
            f"{statistics.median(errors):+.1%}",
            f"{np.quantile(sizes, 0.9):.1%}",
        ]
    return f"| {' | '.join(cells)} |"

"""What ``ringattn plan`` prints: a table for people, JSON for programs."""

from collections.abc import Iterator
from typing import Any

from ringattn.planner import Comparison, Quote
from ringattn.schedule import Lane

_HEAD = ("layout", "method", "u", "forward ms", "backward ms", "TFLOP/s", "intra MB", "inter MB",
         "imbalance", "peak MB")  # fmt: skip
_FORM = "{:14} {:28} {:>3} {:>11} {:>11} {:>8} {:>19} {:>19} {:>9} {:>9}"


def plan_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values.

    `candidates` holds the fastest settings of each (layout, method, u), fastest first; seconds of
    one layer and one pack, bytes of forward and backward together by lane. `choice` is one of them
    by layout, method and u; `predicted` its seconds, forward and backward.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for quote in comparison.quotes:
        row = candidate_row(quote)
        rows.setdefault((row["layout"], row["method"], row["u"]), row)
    best = candidate_row(comparison.best)
    return {
        "candidates": list(rows.values()),
        "choice": {key: best[key] for key in ("method", "layout", "u")},
        "predicted": comparison.best.seconds,
        "reason": comparison.reason,
    }


def candidate_row(quote: Quote) -> dict[str, Any]:
    """One entry of `candidates`."""
    received = quote.received
    lanes = {lane.name.lower(): received[lane] for lane in Lane}
    return {
        "method": quote.candidate.method,
        "layout": quote.candidate.layout,
        "u": quote.candidate.u,
        "forward_s": quote.priced[0].seconds,
        "backward_s": quote.priced[1].seconds,
        "tflops_per_gpu": quote.tflops_per_rank,
        "bytes_mean": {name: float(values.mean()) for name, values in lanes.items()},
        "bytes_max": {name: int(values.max()) for name, values in lanes.items()},
        "imbalance": quote.imbalance,
        "peak_bytes": quote.peak_bytes,
    }


def plan_table(comparison: Comparison) -> Iterator[str]:
    """Lines of the table, fastest first, then what was refused, then the choice."""
    yield _FORM.format(*_HEAD).rstrip()
    yield _FORM.format(*[""] * 6, *["mean / max"] * 2, *[""] * 2).rstrip()
    for quote in comparison.quotes:
        row = candidate_row(quote)
        lanes = [
            f"{row['bytes_mean'][name] / 1e6:.4g} / {row['bytes_max'][name] / 1e6:.4g}"
            for name in ("intra", "inter")
        ]
        yield _FORM.format(
            row["layout"],
            row["method"] + _settings(quote),
            row["u"],
            f"{1e3 * row['forward_s']:.4g}",
            f"{1e3 * row['backward_s']:.4g}",
            f"{row['tflops_per_gpu']:.4g}",
            *lanes,
            f"{row['imbalance']:.2f}",
            f"{row['peak_bytes'] / 1e6:.4g}",
        ).rstrip()
    for refusal in comparison.refusals:
        yield f"refused: {refusal.candidate}: {refusal.reason}"
    yield f"choice: {comparison.reason}"


def _settings(quote: Quote) -> str:
    """The settings that tell a row from others of its method, but for u, which has a column."""
    candidate = quote.candidate
    shown = [f"{name} {value}" for name, value in candidate.options if name != "u"]
    if candidate.wire is not None:
        shown.append(f"{candidate.wire.name.lower()} wire")
    return "".join(f", {setting}" for setting in shown)

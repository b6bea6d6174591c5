"""What an examination found, as a table for people and as JSON."""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ringattn.launch.doctor_links import PairResult
from ringattn.launch.doctor_methods import CellResult

_SHOWN = 20  # findings that are printed; JSON holds all


@dataclass
class Report:
    """Everything that was found so far. Equal on all ranks, but for what a failing step leaves.

    Attributes:
        facts: of each rank. node: ranks per node.
        pairs: that met. reduce: all ranks' all-reduce. rates: of each rank.
        timed: launches and busy plans on a CPU, by step and rank (`doctor_curve`,
            `doctor_executor`); not in the JSON.
        cells: by name. seconds: of each part.
        wrong: one line for each thing that is wrong. notes: what is worth knowing and not wrong.
        broken: whether steps were left out because ranks can no longer work together.
    """

    facts: list[dict[str, Any]] = field(default_factory=list)
    node: int = 1
    pairs: list[PairResult] = field(default_factory=list)
    reduce: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    timed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cells: dict[str, CellResult] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: bool = False

    def lanes(self) -> dict[str, list[PairResult]]:
        """Pairs with figures, by lane, the slowest first."""
        known = [p for p in self.pairs if not math.isnan(p.gbs)]
        names = sorted({p.lane for p in known}, key=("intra", "inter").index)
        return {
            lane: sorted((p for p in known if p.lane == lane), key=lambda p: p.gbs)
            for lane in names
        }

    def medians(self) -> dict[str, dict[str, float]]:
        """Bandwidth and latency of each lane's median pair."""
        return {
            lane: {
                "gbs": statistics.median(p.gbs for p in pairs),
                "latency_us": statistics.median(p.latency_us for p in pairs),
            }
            for lane, pairs in self.lanes().items()
        }


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON holds it; figures that are missing are null."""
    values = asdict(report) | {"links": report.medians(), "ok": not report.wrong}
    del values["timed"]
    return _plain(values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: Report) -> list[str]:
    """The lines of the table, without the findings."""
    lines: list[str] = []
    if report.facts:
        lines += _facts(report)
    for lane, pairs in report.lanes().items():
        middle, slow = report.medians()[lane], pairs[0]
        lines.append(
            f"{lane}-node links  {middle['gbs']:.3g} GB/s per direction, "
            f"{middle['latency_us']:.1f} us (median of {len(pairs)} pairs); "
            f"slowest {slow.ranks[0]} <-> {slow.ranks[1]}: {slow.gbs:.3g} GB/s"
        )
    if report.reduce:
        slowest = min(mine["gbs"] for mine in report.reduce)
        lines.append(f"all-reduce  {slowest:.3g} GB/s sent per rank")
    if report.rates:
        lines += _rates(report.rates)
    if report.cells:
        lines += _cells(report.cells)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    lines.append(f"seconds  {parts}")
    return lines


def _facts(report: Report) -> list[str]:
    first = report.facts[0]
    hosts = list(dict.fromkeys(mine["host"]["name"] for mine in report.facts))
    shown = ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")
    device = first["device"]
    kind = "multiprocessors" if device["type"] == "cuda" else "thread(s) per rank"
    return [
        "versions  " + ", ".join(f"{n} {v}" for n, v in first["versions"].items()),
        f"ranks  {len(report.facts)}, {report.node} per node, started by {first['launcher']}; "
        f"{len(hosts)} host(s): {shown}",
        f"device  {device['name']}, {device['memory_gib']:g} GiB, {device['cores']} {kind}",
        _host(first["host"]),
    ]


def _host(host: Mapping[str, Any]) -> str:
    """What rank 0's host is connected by."""
    ports = [(port["name"], port["gbits"], "Gbit/s") for port in host.get("fabric", [])]
    ports += [(one["name"], one["mbits"], "Mbit/s") for one in host.get("interfaces", [])]
    named = [name + (f" {speed:g} {unit}" if speed else "") for name, speed, unit in ports]
    linked = host.get("nvlink_domain", 0)
    parts = [f"{host['cores']} cores", f"{host.get('numa_nodes') or 1} NUMA node(s)"]
    parts += [f"{linked} GPUs joined by NVLink"] if linked > 1 else []
    return "host  " + ", ".join([*parts, "network " + (", ".join(named) or "none")])


def _rates(rates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Median rank and slowest rank of every rate."""
    lines = []
    for name in (n for n, v in rates[0].items() if isinstance(v, float) and "seconds" not in n):
        values = [mine.get(name, math.nan) for mine in rates]
        slow = min(range(len(values)), key=lambda r: values[r])
        unit = "TFLOP/s" if name.endswith("tflops") else "GB/s"
        label = name.rsplit("_", 1)[0].replace("_", " ")
        if label in ("forward", "backward"):
            kernel = rates[0]["kernel" if label == "forward" else "backward_kernel"]
            label = f"attention {label} ({kernel})"
        lines.append(
            f"{label}  {statistics.median(values):.3g} {unit}; slowest rank {slow}: "
            f"{values[slow]:.3g}"
        )
    return lines


def _cells(cells: Mapping[str, CellResult]) -> list[str]:
    counts = {status: [n for n, c in cells.items() if c.status == status]
              for status in ("ok", "wrong", "failed", "refused")}  # fmt: skip
    good = [cells[name].error for name in counts["ok"]]
    lines = [
        f"methods × masks  {len(counts['ok'])} right (largest error {max(good, default=0):.1e}), "
        + ", ".join(f"{len(counts[s])} {s}" for s in ("wrong", "failed", "refused"))
    ]
    return lines + [f"  refused: {n}: {cells[n].message}" for n in counts["refused"]]


def findings(report: Report) -> list[str]:
    """Lines for the end: notes, then what is wrong, then the verdict."""
    lines = [f"note: {line}" for line in report.notes[:_SHOWN]]
    lines += [f"WRONG: {line}" for line in report.wrong[:_SHOWN]]
    for kind, all_of in (("notes", report.notes), ("things wrong", report.wrong)):
        if len(all_of) > _SHOWN:
            lines.append(f"and {len(all_of) - _SHOWN} more {kind} (--json FILE holds all)")
    if report.wrong:
        lines.append(f"{len(report.wrong)} thing(s) wrong")
    else:
        lines.append("all is right")
    return lines


class Progress:
    """A line on stderr about what is going on: rewritten in place on a terminal.

    Args:
        shown: whether this rank talks to the person.
    """

    def __init__(self, shown: bool) -> None:
        self._shown, self._in_place = shown, sys.stderr.isatty()

    def show(self, part: str, done: int, of: int) -> None:
        """Where a part of the examination is; elsewhere than on a terminal once per part."""
        if self._shown and (self._in_place or done == 0):
            text = f"{part} {done}/{of}" if self._in_place and of > 1 else part
            print(f"\r\x1b[K{text}" if self._in_place else text, end="" if self._in_place else "\n",
                  file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        """Clears the line."""
        if self._shown and self._in_place:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

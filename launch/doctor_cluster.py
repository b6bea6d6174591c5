"""A cluster file for the planner from what was measured; the rest is a shipped cluster's."""

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ringattn.cost import Cluster, Curve, Kernel, Link, dump_cluster, load_cluster, price
from ringattn.launch.doctor_curve import CUT
from ringattn.launch.doctor_fit import fit_curve, fit_on_cores
from ringattn.launch.doctor_rates import Work, attention_plan
from ringattn.schedule import Direction

_KNOWN = {"H100": "h100_sxm", "H200": "h200_sxm", "H800": "h800_sxm", "B200": "b200",
          "A100": "a100_sxm", "A800": "a800_sxm"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a cluster file is made of.

    Attributes:
        facts: of each rank, `ringattn.launch.doctor_host.describe_rank`.
        node: ranks of a node.
        links: median bandwidth and latency, {"intra": {"gbs": …, "latency_us": …}, "inter": …};
            lanes that were not measured are missing.
        rates: of each rank, `ringattn.launch.doctor_rates.measure_rates`.
        work: what the rates were measured on.
        timed: of each rank, by "kernel curve" and "executor", what `doctor_curve` and
            `doctor_executor` timed; empty where they did not.
    """

    facts: Sequence[Mapping[str, Any]]
    node: int
    links: Mapping[str, Mapping[str, float]]
    rates: Sequence[Mapping[str, Any]]
    work: Work
    timed: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """A rate of the median rank; NaN where it was not measured."""
        values = [mine[name] for mine in self.rates if name in mine]
        return statistics.median(values) if values else math.nan

    def rows(self, step: str, part: str) -> list[list[float]]:
        """Rows of a timed step, medians of the ranks number by number."""
        return np.median([mine[part] for mine in self.timed[step]], axis=0).tolist()


def base_cluster(device: Mapping[str, Any]) -> str:
    """The shipped cluster whose data-sheet figures a device takes."""
    if device["type"] == "cpu":
        return "cpu_gloo"
    return next((name for key, name in _KNOWN.items() if key in device["name"]), "h100_sxm")


def cluster_text(measured: Measured, today: datetime.date) -> str:
    """The YAML text of a cluster, with comments that say where its figures come from."""
    base_name = base_cluster(measured.facts[0]["device"])
    cluster, sources = _measured_cluster(measured, load_cluster(base_name), today)
    device = measured.facts[0]["device"]["name"]
    dtype = str(measured.work.dtype).removeprefix("torch.")
    lines = [
        f"Written by ringattn doctor on {today.isoformat()}.",
        f"{len(measured.facts)} ranks, {measured.node} per node; {device}.",
        f"Measured: {', '.join(sources)}; attention in {dtype}, medians of ranks and pairs.",
        f"Everything else is a figure of {base_name}, not of this machine.",
    ]
    return "".join(f"# {line}\n" for line in lines) + dump_cluster(cluster)


def _measured_cluster(
    measured: Measured, base: Cluster, today: datetime.date
) -> tuple[Cluster, list[str]]:
    """The cluster, and the names of its measured fields."""
    fields: dict[str, Any] = {"ranks_per_node": measured.node}
    device, host = measured.facts[0]["device"], measured.facts[0]["host"]
    shared = 1 if device["type"] == "cuda" else measured.node
    sizes = {
        "memory_gib": device["memory_gib"] / shared,
        "host_gib": host["memory_gib"] / measured.node,
        "memory_gbs": measured.median("memory_gbs"),
        "host_gbs": min(measured.median("to_device_gbs"), measured.median("to_host_gbs")),
        "cores": device["cores"],
    }
    if device["type"] == "cpu":
        sizes["host_gbs"] = sizes["host_memory_gbs"] = sizes["memory_gbs"]
    fields |= {n: v if n == "cores" else _round(v) for n, v in sizes.items() if v > 0}
    for lane, found in measured.links.items():
        fields[lane] = _link(getattr(base, lane), found, lane, measured.node, base.nics_per_node)
    fields |= _peak(measured, base)
    names = [*fields, "kernels"]
    about = f"{len(measured.facts)} x {device['name']}, ringattn doctor, {today.isoformat()}"
    cluster = replace(base, name="measured", source=f"{about}; rest: {base.name}.", **fields)
    if measured.timed:
        return _with_costs(measured, cluster), [*names, "on_cores"]
    return _with_kernel(measured, cluster), names


def _link(base: Link, found: Mapping[str, float], lane: str, node: int, nics: int) -> Link:
    """All ranks of a node exchanged at once: between nodes they shared its NICs."""
    share = node / min(nics, node) if lane == "inter" else 1.0
    return replace(base, gbs=_round(found["gbs"] * share), latency_us=_round(found["latency_us"]))


def _peak(measured: Measured, base: Cluster) -> dict[str, float]:
    """The peak of a known GPU and the share of it that products reach; else the peak that the
    base's share makes of the measured rate."""
    device = measured.facts[0]["device"]
    half = device["type"] == "cuda"
    gemm = measured.median("gemm_bf16_tflops" if half else "gemm_fp32_tflops")
    if half and any(key in device["name"] for key in _KNOWN):
        return {"gemm_share": _round(min(1.0, gemm / base.peak_tflops))}
    return {"peak_tflops": _round(gemm / base.gemm_share)}


def _with_costs(measured: Measured, cluster: Cluster) -> Cluster:
    """The cluster with the costs that were fitted to timed launches and plans."""
    base = cluster.kernels[CUT]
    kernel = Kernel(
        forward=fit_curve(measured.rows("kernel curve", "forward"), CUT, base.forward),
        backward=fit_curve(measured.rows("kernel curve", "backward"), CUT, base.backward),
    )
    rows = [row for mine in measured.timed["executor"] for row in mine["rows"]]
    costs = fit_on_cores(rows, int(measured.facts[0]["host"]["cores"]))
    # A round of two messages was timed as latency, of which their CPU time is no part.
    busy = 2 * (costs.message_us + costs.carry_us)
    intra = replace(cluster.intra, latency_us=_round(max(0.0, cluster.intra.latency_us - busy)))
    peak = max(cluster.peak_tflops, kernel.forward.tflops, kernel.backward.tflops)
    return replace(
        cluster, kernel=CUT, kernels={CUT: kernel}, on_cores=costs, intra=intra,
        peak_tflops=peak, jitter=0.0,
    )  # fmt: skip


def _with_kernel(measured: Measured, cluster: Cluster) -> Cluster:
    """The cluster with the measured kernel alone, its curves scaled to give the measured times."""
    name = str(measured.rates[0]["kernel"])
    base = cluster.kernels.get(name, cluster.kernels[cluster.kernel])
    plan = attention_plan(measured.work, 1, None)
    scaled: dict[Direction, Curve] = {}
    for direction in ("forward", "backward"):
        curve = base.curve(direction)
        seconds = measured.median(f"{direction}_seconds")
        steady = replace(cluster, jitter=0.0)
        # Time is a fixed part plus work / rate: two prices tell both.
        slow, fast = (
            price(plan.schedule(direction), _only(steady, name, curve, rate)).seconds
            for rate in (curve.tflops, 2 * curve.tflops)
        )
        work = 2 * (slow - fast) * curve.tflops
        fixed = min(slow - work / curve.tflops, 0.5 * seconds)
        scaled[direction] = replace(curve, tflops=_round(work / (seconds - fixed)))
    # An inferred peak must bound the curves too.
    peak = max(cluster.peak_tflops, *(curve.tflops for curve in scaled.values()))
    return replace(cluster, kernel=name, kernels={name: Kernel(**scaled)}, peak_tflops=peak)


def _only(cluster: Cluster, name: str, curve: Curve, tflops: float) -> Cluster:
    curve = replace(curve, tflops=tflops)
    return replace(cluster, kernel=name, kernels={name: Kernel(forward=curve, backward=curve)})


def _round(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")

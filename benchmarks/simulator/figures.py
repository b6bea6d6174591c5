"""Figures that predictions depend on: a flat mapping from names to numbers, and clusters of it.

Names are `CLUSTER/key` for the dotted keys of a cluster's YAML file and `step/key` for figures of a
training step. `prior` gives the values that data sheets suggest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from ringattn.cost import Cluster, Curve, Kernel, load_cluster

DIRECTIONS = ("forward", "backward")
_LINKS = ("intra.gbs", "intra.latency_us", "inter.gbs", "inter.latency_us", "overlap_tax")


@lru_cache(maxsize=1)
def defaults() -> Mapping[str, Any]:
    """The contents of `configs/calibration/prior.yaml`."""
    source = resources.files("ringattn.configs") / "calibration" / "prior.yaml"
    return yaml.safe_load(source.read_text(encoding="utf-8"))


def generation(cluster: str) -> str:
    """The generation of a cluster's GPUs."""
    known = defaults()["generation"]
    return str(known.get(cluster, known["other"]))


def kernel_share(cluster: str, kernel: str, direction: str) -> float:
    """Share of the peak that a kernel reaches on large tiles, from data sheets."""
    shares = defaults()["kernels"][generation(cluster)]
    return float(shares.get(kernel, shares["other"])[DIRECTIONS.index(direction)])


def prior(name: str) -> tuple[float, float]:
    """The value of a figure before any fit, and the standard deviation of its logarithm."""
    cluster, _, key = name.partition("/")
    table = defaults()
    if cluster == "step":
        value, spread = table["step"][key]
        return float(value), float(spread)
    last = key.rpartition(".")[2]
    spread = float(table["spread"][last])
    if key in ("intra.gbs", "inter.gbs"):
        links = table["links"].get(cluster, table["links"]["h100_sxm"])
        return float(links[key.partition(".")[0]]), spread
    if last in ("latency_us", "overlap_tax"):
        return float(table[last]), spread
    _, kernel, direction, _ = key.split(".")
    if last == "tflops":
        peak = load_cluster(cluster).peak_tflops
        return peak * kernel_share(cluster, kernel, direction), spread
    return float(table["curve"][last]), spread


def link_names(cluster: str) -> list[str]:
    """Names of a cluster's figures of links."""
    return [f"{cluster}/{key}" for key in _LINKS]


def curve_names(cluster: str, kernel: str, direction: str) -> list[str]:
    """Names of the figures of a kernel's curve."""
    keys = ["tflops", "row_pairs", "launch_us", "tail", "result_bytes"]
    keys += ["key_pairs"] * (direction == "backward")
    return [f"{cluster}/kernels.{kernel}.{direction}.{key}" for key in keys]


class Figures:
    """Values by name; those that are not given are the prior's.

    Args:
        values: by name.
    """

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self.values = dict(values or {})
        self._clusters: dict[tuple[str, str], Cluster] = {}

    def __getitem__(self, name: str) -> float:
        found = self.values.get(name)
        return prior(name)[0] if found is None else found

    def nudged(self, name: str, factor: float) -> "Figures":
        """With one figure multiplied."""
        return Figures({**self.values, name: self[name] * factor})

    def step(self, key: str) -> float:
        """A figure of training steps."""
        return self[f"step/{key}"]

    def cluster(self, name: str, kernel: str) -> Cluster:
        """A cluster with the figures of its links and of one kernel, whatever its file says."""
        if (name, kernel) not in self._clusters:
            base = load_cluster(name)
            curves = {d: self._curve(name, kernel, d) for d in DIRECTIONS}
            self._clusters[name, kernel] = replace(
                base,
                intra=replace(base.intra, **self._link(name, "intra")),
                inter=replace(base.inter, **self._link(name, "inter")),
                overlap_tax=self[f"{name}/overlap_tax"],
                kernel=kernel,
                kernels={kernel: Kernel(**curves)},
            )
        return self._clusters[name, kernel]

    def _link(self, name: str, which: str) -> dict[str, float]:
        return {key: self[f"{name}/{which}.{key}"] for key in ("gbs", "latency_us")}

    def _curve(self, name: str, kernel: str, direction: str) -> Curve:
        names = curve_names(name, kernel, direction)
        keys: dict[str, Any] = {full.rpartition(".")[2]: self[full] for full in names}
        rows = 128 if direction == "forward" else 64
        return Curve(block_rows=rows, block_keys=128, **keys)


def names_of(kernels: Sequence[tuple[str, str]]) -> list[str]:
    """Names of all figures of clusters with these kernels, and of steps."""
    found: list[str] = []
    for cluster, kernel in kernels:
        found += link_names(cluster)
        for direction in DIRECTIONS:
            found += curve_names(cluster, kernel, direction)
    return list(dict.fromkeys(found))

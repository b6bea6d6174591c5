"""Fits a cluster's figures to published rows: damped Gauss-Newton on logarithmic errors.

The error of a row is log(simulated / published). Large errors count linearly, not squarely (Huber),
and every figure is drawn towards its start value by a prior, so that figures that no row depends on
stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml

from ringattn.benchmarks.calibration_plans import schedules_of
from ringattn.benchmarks.calibration_rows import Row, masks_of
from ringattn.cost import Cluster, Survey, dump_cluster, parse_cluster, price_survey, survey

HUBER = 0.08  # logarithmic error from which on a row counts linearly
SPREAD = {
    "tflops": 0.15,
    "gbs": 0.3,
    "tail": 0.3,
}  # prior standard deviation of a logarithm, by figure
OTHERS = 0.8
STEPS, NUDGE = 10, 0.02
DAMPINGS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
# Where fits start: figures of these names; of other names, one digit of the file's.
ROUND = {
    "row_pairs": 100.0, "key_pairs": 200.0, "launch_us": 20.0, "latency_us": 20.0, "tail": 0.3,
    "overlap_tax": 0.03,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A row with its counts: one list of surveys per mask, one survey per direction."""

    row: Row
    surveys: tuple[tuple[Survey, ...], ...]


def case_of(row: Row, cluster: Cluster) -> Case:
    """Builds and surveys the plans of a row."""
    kernel = cluster.kernel_named(row.kernel)
    found = []
    for mask in masks_of(row):
        curves = [kernel.curve(d) for d in row.directions]
        schedules = schedules_of(row, mask)
        found.append(
            tuple(
                survey(s, c.block_rows, c.block_keys)
                for s, c in zip(schedules, curves, strict=True)
            )
        )
    return Case(row, tuple(found))


def simulated(case: Case, cluster: Cluster) -> float:
    """TFLOP/s per GPU of a row's plans, the mean over its masks."""
    kernel = cluster.kernel_named(case.row.kernel)
    speeds = []
    for surveys in case.surveys:
        seconds = sum(price_survey(s, cluster, kernel.curve(s.direction)).seconds for s in surveys)
        speeds.append(sum(s.flops for s in surveys) / (1e12 * case.row.gpus * seconds))
    return float(np.mean(speeds))


def errors(cases: Sequence[Case], cluster: Cluster) -> np.ndarray:
    """log(simulated / published) of each case."""
    return np.log([simulated(case, cluster) / case.row.tflops for case in cases])


def fit(cases: Sequence[Case], start: Cluster, paths: Sequence[str]) -> Cluster:
    """The cluster whose figures at `paths` (dotted keys of its YAML) fit the cases best."""
    tree = yaml.safe_load(dump_cluster(start))
    origin = np.log([_read(tree, path) for path in paths])
    spread = np.array([SPREAD.get(path.rpartition(".")[2], OTHERS) for path in paths])
    prior = HUBER**2 / spread**2

    def at(point: np.ndarray) -> Cluster:
        for path, value in zip(paths, np.exp(point), strict=True):
            _write(tree, path, float(value))
        return parse_cluster(yaml.safe_dump(tree), start.name)

    def loss(error: np.ndarray, point: np.ndarray) -> float:
        size = np.abs(error)
        rows = np.where(size < HUBER, size**2, HUBER * (2 * size - HUBER)).sum()
        return float(rows + (prior * (point - origin) ** 2).sum())

    point, error = origin, errors(cases, start)
    for _ in range(STEPS):
        columns = [errors(cases, at(point + NUDGE * unit)) for unit in np.eye(len(paths))]
        jacobian = (np.stack(columns, axis=1) - error[:, None]) / NUDGE
        weight = np.minimum(1.0, HUBER / np.maximum(np.abs(error), 1e-9))
        normal = jacobian.T @ (weight[:, None] * jacobian) + np.diag(prior)
        slope = jacobian.T @ (weight * error) + prior * (point - origin)
        before = loss(error, point)
        for damping in DAMPINGS:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), slope)
            trial = point - np.clip(step, -0.7, 0.7)
            found = errors(cases, at(trial))
            if loss(found, trial) < before:
                point, error = trial, found
                break
        if loss(error, point) > (1 - 1e-3) * before:
            break
    return at(_rounded(point))


def free_figures(rows: Sequence[Row]) -> list[str]:
    """Dotted keys of the figures that rows of one cluster can tell: links, and their kernels'."""
    paths = ["intra.gbs", "intra.latency_us", "inter.gbs", "inter.latency_us", "overlap_tax"]
    for kernel in sorted({row.kernel for row in rows}):
        mine = [row for row in rows if row.kernel == kernel]
        names = ["row_pairs", "launch_us", "tail"]
        # Calls on 4K tokens are too short for a GPU to reach the clock that it sustains.
        if any(row.gpus > 1 or row.seq_len > 4096 for row in mine):
            names += ["tflops", "result_bytes"]
        for direction in ("forward", "backward"):
            if any(direction in row.directions for row in mine):
                keys = names if direction == "forward" else [*names, "key_pairs"]
                paths += [f"kernels.{kernel}.{direction}.{key}" for key in keys]
    return paths


def neutral(cluster: Cluster, paths: Sequence[str]) -> Cluster:
    """A start that does not remember an earlier fit: round or one digit figures at the paths."""
    tree = yaml.safe_load(dump_cluster(cluster))
    for path in paths:
        one_digit = float(f"{_read(tree, path):.1g}")
        _write(tree, path, ROUND.get(path.rpartition(".")[2], one_digit))
    return parse_cluster(yaml.safe_dump(tree), cluster.name)


def _rounded(point: np.ndarray) -> np.ndarray:
    """Values to three digits: more would claim what the rows do not say."""
    return np.log([float(f"{value:.3g}") for value in np.exp(point)])


def _read(tree: dict, path: str) -> float:
    for key in path.split("."):
        tree = tree[key]
    return float(tree)  # type: ignore[arg-type]


def _write(tree: dict, path: str, value: float) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree[key]
    tree[last] = float(f"{value:.6g}")


def folds_of(rows: Sequence[Row], count: int, seed: int = 0) -> np.ndarray:
    """A fold for each row; rows of one run share a fold."""
    runs = sorted({row.run for row in rows}, key=repr)
    order = np.random.default_rng(seed).permutation(len(runs))
    fold = {runs[int(r)]: int(i) % count for i, r in enumerate(order)}
    return np.array([fold[row.run] for row in rows])

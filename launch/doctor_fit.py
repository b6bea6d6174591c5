"""Fits the figures of a CPU cluster to what was timed: times are sums of counts times costs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ringattn.cost import Curve, OnCores

_ROUNDS = 30
_NEAR = 0.02  # relative errors below this weigh alike


def fit_costs(counts: np.ndarray, seconds: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """Costs >= 0 of each kind of count, with the least sum of absolute relative errors.

    Least squares by turns reweighted by the last errors, so that outliers of a busy machine count
    as errors and not as squares.

    Args:
        counts: (rows, kinds), at least 0. seconds: (rows,), above 0.
        floor: seconds below which errors count absolutely.

    Returns:
        Seconds for one of each kind, (kinds,); 0 for kinds that no row has.
    """
    scale = np.where(counts.max(axis=0) > 0, counts.max(axis=0), 1.0)
    size = np.maximum(seconds, floor)
    weight = 1.0 / size
    costs = np.zeros(counts.shape[1])
    for _ in range(_ROUNDS):
        costs = least_squares(counts / scale * weight[:, None], seconds * weight) / scale
        error = np.abs(counts @ costs - seconds) / size
        weight = 1.0 / (size * np.sqrt(np.maximum(error, _NEAR)))
    return costs


def least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |matrix x - target| (the active-set method of Lawson and Hanson)."""
    count = matrix.shape[1]
    free, x = np.zeros(count, dtype=bool), np.zeros(count)
    least = 1e-10 * max(float(np.abs(matrix.T @ target).max(initial=0.0)), 1e-300)
    for _ in range(10 * count):
        slope = np.where(free, -np.inf, matrix.T @ (target - matrix @ x))
        if slope.max() <= least:
            break
        free[slope.argmax()] = True
        while True:
            found = np.zeros(count)
            found[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            below = free & (found <= 0)
            if not below.any():
                x = found
                break
            step = (x[below] / (x[below] - found[below])).min()
            x = x + step * (found - x)
            free &= x > 1e-15
            x[~free] = 0.0
            if not free.any():
                break
    return x


def fit_curve(rows: Sequence[Sequence[float]], cut: str, base: Curve) -> Curve:
    """A curve from rows of `ringattn.launch.doctor_curve.measure_curve`.

    Where no row has block matrices, `base` keeps their figures.
    """
    table = np.array(rows)
    pairs, row, key, call, launch, mask, matrix, product = fit_costs(table[:, :-1], table[:, -1])
    rate = 1.0 / (1e12 * max(pairs, 1e-18))
    curve = replace(
        base,
        cut=cut,
        tflops=_round(rate),
        block_rows=1,
        block_keys=1,
        row_pairs=_round(row / pairs),
        key_pairs=_round(key / pairs),
        tile_us=_round(1e6 * call),
        launch_us=_round(1e6 * launch),
        tail=0.0,
        result_bytes=0.0,
        mask_ns=_round(1e9 * mask),
    )
    if not table[:, 6].any():
        return curve
    matrix_rate = 1.0 / (1e12 * matrix) if matrix > 0 else rate
    return replace(curve, matrix_tflops=_round(matrix_rate), matrix_us=_round(1e6 * product))


def fit_on_cores(rows: Sequence[Sequence[float]], cores: int) -> OnCores:
    """Costs of the executor from rows of `ringattn.launch.doctor_executor.measure_executor`."""
    table = np.array(rows)
    run, made, steps, posted, parts, copied, added, ends, moved, own, others = table.T
    columns = (run, made, steps, posted, parts, copied, added)
    costs = fit_costs(np.stack(columns, axis=1), own, floor=2e-4)
    start, making, step, message, part, copy, add = costs
    moving = ends > 0
    per_end, per_byte = fit_costs(
        np.stack([ends, moved], axis=1)[moving], np.maximum(others[moving], 1e-7), floor=1e-4
    )
    default = OnCores(cores=cores)
    return OnCores(
        cores=cores,
        run_us=_round(1e6 * start),
        run_gbs=_rate(making, default.run_gbs),
        step_us=_round(1e6 * step),
        message_us=_round(1e6 * message),
        part_us=_round(1e6 * part),
        copy_gbs=_rate(copy, default.copy_gbs),
        add_gbs=_rate(add, default.add_gbs),
        carry_gbs=_rate(per_byte, default.carry_gbs),
        carry_us=_round(1e6 * per_end),
    )


def _rate(seconds_per_byte: float, default: float) -> float:
    """1e9 bytes per second; the default for what took no measurable time."""
    return _round(1e-9 / seconds_per_byte) if seconds_per_byte > 1e-13 else default


def _round(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")

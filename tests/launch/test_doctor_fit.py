"""Costs that were put in come out of the fits of ``ringattn doctor``."""

import numpy as np
import pytest

from ringattn.cost import Curve
from ringattn.cost.survey import survey
from ringattn.launch.doctor_curve import COUNTS, CUT, CurveWork, sample_plans
from ringattn.launch.doctor_executor import COUNTS as EXECUTOR_COUNTS
from ringattn.launch.doctor_executor import direction_counts
from ringattn.launch.doctor_fit import fit_costs, fit_curve, fit_on_cores, least_squares
from ringattn.schedule import Direction

BASE = Curve(tflops=1.0, tail=0.5, result_bytes=12.0)


def curve_counts(direction: Direction) -> np.ndarray:
    """Counts of all steps of the launches that a real machine is measured with."""
    rows = []
    for plan in sample_plans(CurveWork()):
        load = survey(plan.schedule(direction), 1, 1, cut=CUT).load
        table = np.stack([getattr(load, name).ravel() for name in COUNTS], axis=1)
        rows.append(table[load.launches.ravel() > 0])
    return np.concatenate(rows)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_curve_comes_out_of_its_own_times(direction: Direction) -> None:
    counts = curve_counts(direction)
    truth = Curve(
        tflops=0.08, row_pairs=50.0, key_pairs=20.0, tile_us=90.0, launch_us=300.0,
        mask_ns=4.0, matrix_tflops=0.05, matrix_us=200.0,
    )  # fmt: skip
    pair = 1e-12 / truth.tflops
    costs = np.array([
        pair, truth.row_pairs * pair, truth.key_pairs * pair, 90e-6, 300e-6, 4e-9,
        1e-12 / truth.matrix_tflops, 200e-6,
    ])  # fmt: skip
    rows = np.column_stack([counts, counts @ costs])
    found = fit_curve(rows.tolist(), CUT, BASE)
    for name in ("tflops", "row_pairs", "key_pairs", "tile_us", "launch_us", "mask_ns"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02), name
    assert found.matrix_tflops == pytest.approx(0.05, rel=0.02)
    assert found.matrix_us == pytest.approx(200.0, rel=0.02)
    assert (found.cut, found.tail, found.result_bytes) == (CUT, 0.0, 0.0)


def test_outliers_do_not_move_a_fit() -> None:
    rng = np.random.default_rng(0)
    counts = rng.uniform(0.0, 10.0, (200, 4))
    truth = np.array([1e-3, 2e-4, 0.0, 5e-4])
    seconds = counts @ truth * rng.normal(1.0, 0.01, 200)
    seconds[::10] *= 5.0  # another process was in the way
    found = fit_costs(counts, seconds)
    assert found == pytest.approx(truth, rel=0.05, abs=2e-5)


def test_no_cost_is_negative() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(30, 5))
    target = matrix @ np.array([1.0, -2.0, 3.0, 0.0, -1.0])
    found = least_squares(matrix, target)
    slope = matrix.T @ (target - matrix @ found)
    assert (found >= 0).all()
    # Optimal: no free direction, and none at 0, would make it smaller.
    assert slope[found > 0] == pytest.approx(0.0, abs=1e-9)
    assert (slope[found == 0] <= 1e-9).all()


def test_executor_costs_come_out_of_their_own_times() -> None:
    rows = []
    for plan in sample_plans(CurveWork()):
        for direction in ("forward", "backward"):
            counts = survey(plan.schedule(direction), 1, 1, host=True)
            for rank in range(plan.world):
                found = dict(zip(EXECUTOR_COUNTS, direction_counts(counts, rank), strict=True))
                own = 4e-4 + found["made"] / 8e9 + 2e-5 * found["steps"] + 6e-5 * found["posted"]
                own += 1e-5 * found["parts"] + found["copied"] / 5e9 + found["added"] / 3e9
                carried = 3e-5 * found["ends"] + found["moved"] / 2e9
                rows.append([*found.values(), own, carried])
    costs = fit_on_cores(rows, 3)
    assert costs.cores == 3
    for name, value in {
        "run_us": 400.0, "run_gbs": 8.0, "step_us": 20.0, "message_us": 60.0, "part_us": 10.0,
        "copy_gbs": 5.0, "add_gbs": 3.0, "carry_us": 30.0, "carry_gbs": 2.0,
    }.items():  # fmt: skip
        assert getattr(costs, name) == pytest.approx(value, rel=0.05), name

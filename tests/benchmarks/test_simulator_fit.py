"""The simulator's fit: it finds what made its rows, does not read rows that it leaves out, and is
written so that it reads the same."""

from dataclasses import replace

import numpy as np
import pytest

from ringattn.benchmarks import fit_simulator, validate_simulator
from ringattn.benchmarks.simulator import fitting
from ringattn.benchmarks.simulator.attention import Prices, partial_of
from ringattn.benchmarks.simulator.calibration_file import dump_calibration, load_calibration
from ringattn.benchmarks.simulator.effects import effects_of, noise_of
from ringattn.benchmarks.simulator.figures import Figures
from ringattn.benchmarks.simulator.memory_parts import memory_parts
from ringattn.benchmarks.simulator.predict import Calibration, predict, raw_speed
from ringattn.benchmarks.simulator.records import read
from ringattn.benchmarks.simulator.step_parts import step_parts
from ringattn.errors import UserError
from tests.benchmarks.simulator_rows import ATTENTION, STEP, write

METHODS = ("ulysses", "ring", "allgather")


def made_rows(tmp_path, factor: float):
    """Rows of a cluster whose kernel is `factor` times as fast as the data sheet says."""
    rows = read(
        write(
            tmp_path / "t.csv",
            *[
                ATTENTION | {"method": m, "mask": k, "metric": f"{d}_tflops_per_gpu"}
                for m in METHODS
                for k in ("full", "causal")
                for d in ("fwd", "bwd")
            ],
        )
    )
    names = [f"h100_sxm/kernels.fa3_unfused.{d}.tflops" for d in ("forward", "backward")]
    figures = Figures()
    for name in names:
        figures = figures.nudged(name, factor)
    prices = Prices(figures)
    return [replace(row, value=raw_speed(row, prices).value) for row in rows]


def test_a_fit_finds_the_speed_that_made_the_rows(tmp_path):
    rows = made_rows(tmp_path, 0.9)
    before = validate_simulator.predicted(rows, Calibration(Figures()))
    after = validate_simulator.predicted(rows, fit_simulator.fitted(rows))
    assert min(one.error for one in before if one.error is not None) > 0.04
    assert max(abs(one.error) for one in after if one.error is not None) < 0.015


def test_rows_that_are_left_out_do_not_move_the_fit(tmp_path):
    rows = made_rows(tmp_path, 0.9)
    use = np.arange(len(rows) - 2)
    spoiled = [*rows[:-2], *(replace(row, value=1.0) for row in rows[-2:])]
    fits = [
        fitting.solve(fitting.linearise(table, Figures()), use).figures.values
        for table in (rows, spoiled)
    ]
    assert fits[0] == fits[1]
    seen = fitting.solve(fitting.linearise(spoiled, Figures()), np.arange(len(rows)))
    assert seen.figures.values != fits[0]


def test_folds_keep_runs_together(tmp_path):
    rows = made_rows(tmp_path, 1.0)
    folds = fitting.folds_of(rows, 3)
    for row, fold in zip(rows, folds, strict=True):
        same = [f for other, f in zip(rows, folds, strict=True) if other.run == row.run]
        assert set(same) == {fold}


def test_a_fit_reads_as_it_was_written(tmp_path):
    fit = Calibration(
        Figures({"a800_sxm/intra.gbs": 91.25, "step/fp8_gain": 1.5}),
        {"step: source=x": 0.25, "step: source=y": 0.0001},
    )
    path = tmp_path / "fit.yaml"
    path.write_text(dump_calibration(fit, "a test"))
    back = load_calibration(path)
    assert back.figures.values == fit.figures.values
    assert back.effects == {"step: source=x": 0.25}
    path.write_text("figures: {a800_sxm/nothing: 1}\neffects: {}\n")
    with pytest.raises(UserError, match="unknown"):
        load_calibration(path)
    path.write_text("figures: [1]\n")
    with pytest.raises(UserError, match="figures"):
        load_calibration(path)


def test_parts_of_a_step_sum_to_it_and_follow_their_causes(tmp_path):
    (row,) = read(write(tmp_path / "t.csv", STEP))
    fit = load_calibration()
    step = step_parts(row, Prices(fit.figures))
    assert all(seconds >= 0 for seconds in step.seconds.values())
    assert step.total == pytest.approx(sum(step.seconds.values()))
    kept = step_parts(replace(row, checkpointing="none"), Prices(fit.figures))
    saved = step_parts(replace(row, checkpointing="attn-output-saved"), Prices(fit.figures))
    assert kept.total < saved.total < step.total
    assert saved.seconds["attention again"] == 0
    assert kept.seconds["products again"] == 0
    memory = [
        memory_parts(replace(row, checkpointing=mode), fit.figures).total
        for mode in ("layer-input", "seq-selective", "attn-output-saved", "none")
    ]
    assert memory == sorted(memory)
    assert len(set(memory)) == 4


def test_effects_move_rows_that_share_them_and_no_others(tmp_path):
    rows = read(write(tmp_path / "t.csv", STEP, STEP | {"source": "another"}))
    prices = Prices(Figures())
    plain = [predict(row, Calibration(Figures()), prices).value for row in rows]
    fit = Calibration(Figures(), {"step: source=trainer": np.log(1.1)})
    moved = [predict(row, fit, prices).value for row in rows]
    assert moved[0] == pytest.approx(1.1 * plain[0])
    assert moved[1] == plain[1]


def shared_rows(tmp_path):
    """Rows of two methods on dense masks and documents; the second's source is 1.2 times as fast
    on all of them."""
    made = []
    for source, method in (("bench", "ulysses"), ("other", "ring")):
        for mask in ("full", "causal", "doc_causal"):
            for direction in ("fwd", "bwd"):
                names = {"source": source, "method": method, "mask": mask, "seq_len": "32768"}
                made.append(ATTENTION | names | {"metric": f"{direction}_tflops_per_gpu"})
    rows = read(write(tmp_path / "t.csv", *made))
    prices = Prices(Figures())
    speeds = [raw_speed(row, prices).value * (1.2 if row.source == "other" else 1) for row in rows]
    return [replace(row, value=speed) for row, speed in zip(rows, speeds, strict=True)]


def test_predictions_are_those_of_the_linear_model(tmp_path):
    rows = shared_rows(tmp_path)
    model = fitting.linearise(rows, Figures())
    fit = fitting.solve(model, np.arange(len(rows)))
    moved = np.log([fit.figures[name] for name in model.names]) - model.at
    units = np.array([fit.effects[name] for name in model.effects]) / model.spreads
    expected = model.error + model.slope @ moved + model.weights @ units
    prices = Prices(fit.figures)
    found = [np.log(predict(row, fit, prices).value / (row.value or 1)) for row in model.rows]
    assert np.abs(units).max() > 0.2
    assert found == pytest.approx(expected, abs=0.005)


def test_what_a_source_shares_is_found_on_masks_that_it_left_out(tmp_path):
    rows = shared_rows(tmp_path)
    parts = ["out" if r.source == "other" and r.mask == "causal" else "in" for r in rows]
    seen = validate_simulator.held_out(rows, parts)
    unseen = validate_simulator.held_out(rows, [row.source for row in rows])
    for one, blind, part in zip(seen, unseen, parts, strict=True):
        if part == "out":
            # 20 % is many prior deviations: two masks show more than half of it, not all.
            assert one.error is not None
            assert blind.error is not None
            assert blind.error < -0.1
            assert abs(one.error) < abs(blind.error) / 2


def test_predictions_of_held_out_rows_do_not_know_their_values(tmp_path):
    rows = shared_rows(tmp_path)
    parts = ["out" if row.mask == "causal" else "in" for row in rows]
    spoiled = [
        replace(row, value=3 * (row.value or 1)) if part == "out" else row
        for row, part in zip(rows, parts, strict=True)
    ]
    first, second = (validate_simulator.held_out(table, parts) for table in (rows, spoiled))
    for one, other, part in zip(first, second, parts, strict=True):
        if part == "out":
            assert one.value == other.value
    assert any(a.value != b.value for a, b in zip(first, second, strict=True))


def test_few_repetitions_count_less(tmp_path):
    many, few = read(
        write(
            tmp_path / "t.csv",
            ATTENTION | {"note": "median of 16 runs"},
            ATTENTION | {"note": "median of 1 runs"},
        )
    )
    assert noise_of(few) == pytest.approx(4 * noise_of(many))


def test_few_repetitions_of_a_long_call_count_as_much(tmp_path):
    long = ATTENTION | {"seq_len": str(1 << 22)}
    many, few = read(
        write(
            tmp_path / "t.csv",
            long | {"note": "median of 16 runs"},
            long | {"note": "median of 1 runs"},
        )
    )
    assert noise_of(few) == pytest.approx(noise_of(many), rel=0.1)


def test_rows_of_both_directions_take_the_effects_of_each(tmp_path):
    metrics = [f"{d}_tflops_per_gpu" for d in ("fwd", "bwd", "fwdbwd")]
    made = [ATTENTION | {"metric": metric} for metric in metrics]
    forward, backward, both = (effects_of(row) for row in read(write(tmp_path / "t.csv", *made)))
    name = "attention: source={} direction={}"
    found = [n for n in both if n.startswith("attention: source=") and "direction=" in n]
    assert len(found) == 2
    assert name.format("bench", "forward") in forward.keys() & both.keys()
    assert name.format("bench", "backward") in backward.keys() & both.keys()
    for kind in ("attention: ", "partial: "):
        weights = [both[n][0] for n in both if n.startswith(kind) and "direction=" in n]
        alone = [forward[n][0] for n in forward if n.startswith(kind) and "direction=" in n]
        assert sum(weights) == pytest.approx(sum(alone), rel=0.2)


def test_the_share_of_partial_tiles_follows_the_plan(tmp_path):
    names = [("kernel-fa3", "causal"), ("kernel-fa3", "full"), ("ulysses", "causal"),
             ("ring", "causal"), ("ulysses", "doc_causal")]  # fmt: skip
    made = [
        ATTENTION | {"method": m, "mask": k, "gpus": "1" if "kernel" in m else ATTENTION["gpus"]}
        for m, k in names
    ]
    rows = read(write(tmp_path / "t.csv", *made))
    shares = [partial_of(row) for row in rows]
    assert shares[:3] == [1.0, 0.0, 1.0]
    assert 0 < shares[3] < 0.5  # zigzag: the tiles of a rank's own chunks
    assert [any(n.startswith("partial") for n in effects_of(row)) for row in rows] == [
        True, False, True, True, False,
    ]  # fmt: skip

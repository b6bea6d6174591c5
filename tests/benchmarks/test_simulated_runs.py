"""Predictions beside runs: every cell has a record, from a known cluster the known seconds."""

from dataclasses import replace
from pathlib import Path

import pytest

from ringattn.benchmarks.host_runs import Cell, predict
from ringattn.benchmarks.record import Record, Recorder, read_records
from ringattn.benchmarks.simulated_report import NAME, error_table
from ringattn.benchmarks.simulated_runs import main
from ringattn.cost import Curve, Kernel, OnCores, dump_cluster, load_cluster
from ringattn.methods import METHODS


def known_cluster(path: Path) -> Path:
    """A cluster file of ranks that pay for exact pairs and for nothing else, at 1e9 FLOP/s."""
    curve = Curve(tflops=1e-3, block_rows=1, block_keys=1, cut="cpu_flash")
    free = OnCores(cores=64, run_gbs=1e9, copy_gbs=1e9, add_gbs=1e9, carry_gbs=1e9)
    base = load_cluster("cpu_gloo")
    cluster = replace(
        base, name="known", kernels={"cpu_flash": Kernel(forward=curve, backward=curve)},
        on_cores=free, intra=replace(base.intra, latency_us=0.0), jitter=0.0,
    )  # fmt: skip
    path.write_text(dump_cluster(cluster))
    return path


def test_a_prediction_is_what_a_hand_computes(tmp_path: Path) -> None:
    cell = Cell("full", "ring", 2, 256)
    made = predict(cell.plan(2), load_cluster(known_cluster(tmp_path / "known.yaml")))
    pairs = 256 * 128 * 8  # of one rank, over all heads
    assert made.forward == pytest.approx(pairs * 4 * 64 / 1e9, rel=1e-3)
    assert made.backward == pytest.approx(pairs * 10 * 64 / 1e9, rel=1e-3)
    assert made.cpu == pytest.approx(made.wall, rel=1e-3)


def test_every_cell_has_a_record_and_is_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "runs.jsonl"
    arguments = [
        "--world", "2", "--masks", "documents_causal", "blocks_uniform", "--seq-len", "256",
        "--repeats", "1", "--cluster", str(known_cluster(tmp_path / "known.yaml")),
        "--json", str(results),
    ]  # fmt: skip
    main(arguments)
    records = read_records(results)
    assert {r.name for r in records} == {NAME}
    assert {(r.config["mask"], r.config["method"]) for r in records} == {
        (mask, method) for mask in ("documents_causal", "blocks_uniform") for method in METHODS
    }
    for record in records:
        if record.status == "ok":
            f = {name: value or 0.0 for name, value in record.figures.items()}
            assert record.value == pytest.approx(f["predicted_seconds"] / f["seconds"] - 1)
            assert min(f.values()) > 0
    assert [r.status for r in records].count("ok") >= len(METHODS)
    assert "| method ring | 2 |" in capsys.readouterr().out
    main(arguments)
    assert read_records(results) == records, "measured again"


def test_the_table_holds_medians_and_what_is_missing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "x.jsonl")
    for index, (wall, cpu) in enumerate([(1.1, 1.0), (0.9, 1.02), (1.3, 1.04)]):
        figures = {
            "seconds": 1.0, "predicted_seconds": wall, "cpu_seconds": 2.0,
            "predicted_cpu_seconds": 2.0 * cpu,
        }  # fmt: skip
        config = {"ranks": 2, "method": "ring", "mask": f"m{index}"}
        recorder.ok(NAME, f"c{index}", wall - 1, "x", config=config, figures=figures)
    recorder.refused(NAME, "c3", "x", "impossible", {"ranks": 2, "method": "ring", "mask": "m3"})
    lines = error_table(read_records(recorder.path))
    assert lines[0] == "3 cells measured, 1 refused or failed"
    assert "| all | 3 | 10.0% | +10.0% | 26.0% | 2.0% | +2.0% | 3.6% |" in lines


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--seq-len", "100"])
    assert ended.value.code == 2
    assert "must be at least 128" in capsys.readouterr().err


def test_records_of_other_benchmarks_are_left_out() -> None:
    other = Record(name="bench.masks", case="x", value=1.0, unit="TFLOP/s")
    assert error_table([other]) == ["0 cells measured, 0 refused or failed"]

"""The simulated scaling suite records every cell once, in the schema of all suites."""

import pytest

from ringattn.benchmarks.record import Recorder, read_records
from ringattn.benchmarks.suites.scaling_suite import NAME, UNIT, run
from ringattn.benchmarks.suites.settings import Settings
from ringattn.errors import UserError

SMALL = {
    "gpus": [8, 32], "group": 16, "masks": ["causal"], "methods": ["ring", "double_ring"],
    "weak": 1024, "strong": {"seq_len": 32768, "sequences": 8},
}  # fmt: skip


def test_every_cell_is_recorded_once(tmp_path):
    path, shown = tmp_path / "scaling.jsonl", []
    run(SMALL, Recorder(path), shown.append)
    first = read_records(path)
    assert shown == ["causal ring", "causal double_ring"]
    plain = [r for r in first if r.config["links"] == "as they are"]
    keys = [(r.config["kind"], r.config["ranks"], r.config["method"]) for r in plain]
    methods = ("ring", "double_ring")
    wanted = {(k, n, m) for k in ("weak", "strong") for n in (8, 16, 32) for m in methods}
    assert set(keys) == wanted
    assert len(keys) == len(wanted)
    assert len({r.config["links"] for r in first}) == 5
    for record in first:
        assert (record.name, record.unit, record.config["simulated"]) == (NAME, UNIT, True)
        figures, config = record.figures, record.config
        assert record.value is not None
        speeds = {name: number for name, number in figures.items() if number is not None}
        assert record.value * config["ranks"] == pytest.approx(speeds["tokens_per_second"])
        assert speeds["mfu"] == pytest.approx(speeds["tflops"] / 989, rel=0.01)
        assert speeds["step_seconds"] > 0
        assert speeds["peak_bytes"] > 2**30
    run(SMALL, Recorder(path), shown.append)
    assert read_records(path) == first


def test_a_method_that_cannot_is_recorded_with_its_reason(tmp_path):
    path = tmp_path / "scaling.jsonl"
    run(SMALL | {"methods": ["double_ring"], "gpus": [1, 1]}, Recorder(path), str)
    for record in read_records(path):
        assert record.status in ("ok", "refused")
        assert bool(record.reason) == (record.status == "refused")


def test_settings_of_all_suites_are_taken(tmp_path):
    with pytest.raises(UserError, match="colour"):
        run({"colour": "red"}, Recorder(tmp_path / "a.jsonl"), str)
    with pytest.raises(UserError, match="gpus"):
        run({"gpus": 8}, Recorder(tmp_path / "a.jsonl"), str)
    assert Settings().command("scaling", "--simulate").endswith("--simulate")

"""The simulated scaling suite records every cell once, in the schema of all suites."""

import importlib.resources
import io
from dataclasses import replace
from pathlib import Path

import pytest

from ringattn.benchmarks.record import Record, Recorder, read_records
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.scaling_suite import NAME, UNIT, run
from ringattn.benchmarks.suites.settings import Settings, load_settings
from ringattn.benchmarks.suites.simulated_settings import SimulatedSettings
from ringattn.errors import UserError
from ringattn.launch.main import main

SMALL = SimulatedSettings(
    gpus=(8, 32), group=16, masks=("causal",), methods=("ring", "double_ring"), weak=1024,
    strong_seq_len=32768, strong_sequences=8,
)  # fmt: skip


def predict(path: Path, simulated: SimulatedSettings) -> tuple[list[Record], str]:
    """All records of the file after a run, and what was shown."""
    shown = io.StringIO()
    run(Settings(simulated=simulated, simulate=True), Recorder(path), Progress(shown))
    return read_records(path), shown.getvalue()


def test_every_cell_is_recorded_once(tmp_path):
    path = tmp_path / "scaling.jsonl"
    first, shown = predict(path, SMALL)
    assert "[0/2] causal ring" in shown
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
    assert predict(path, SMALL)[0] == first


def test_a_method_that_cannot_is_recorded_with_its_reason(tmp_path):
    few = replace(SMALL, methods=("double_ring",), gpus=(1, 1))
    for record in predict(tmp_path / "scaling.jsonl", few)[0]:
        assert record.status in ("ok", "refused")
        assert bool(record.reason) == (record.status == "refused")


def test_a_cluster_file_and_sizes_come_from_the_command_line(tmp_path):
    cluster = tmp_path / "mine.yaml"
    source = importlib.resources.files("ringattn.configs") / "clusters" / "h100_sxm.yaml"
    cluster.write_text(source.read_text().replace("name: h100_sxm", "name: mine"))
    out = tmp_path / "out"
    code = main(
        ["bench", "scaling", "--simulate", "--out", str(out), "--masks", "causal", "--methods",
         "ring", f"simulated.cluster={cluster}", "simulated.gpus=[8,8]", "simulated.weak=1024",
         "simulated.strong_seq_len=32768"]
    )  # fmt: skip
    records = read_records(out / "scaling.jsonl")
    assert code == 0
    assert {record.config["cluster"] for record in records} == {"mine"}
    assert records[0].config["command"].count("--simulate") == 1


@pytest.mark.parametrize("given", ["gpus=8", "gpus=[64,8]", "weak=0", "masks=[nothing]", "x=1"])
def test_settings_that_cannot_be_are_refused(given):
    with pytest.raises(UserError, match="simulated|gpus|nothing"):
        load_settings("smoke", [f"simulated.{given}"])

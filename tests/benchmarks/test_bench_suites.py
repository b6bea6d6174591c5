"""The suites of attention on real ranks: every cell recorded, failures, resumption, the judge."""

import io
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.benchmarks import repeatability
from ringattn.benchmarks.record import Recorder, keep_figures, read_records
from ringattn.benchmarks.suites import (
    attention_suite,
    kernels_suite,
    marker,
    masks_suite,
    measured_scaling,
    methods_suite,
)
from ringattn.benchmarks.suites.cells import DIRECTIONS, OURS, Entrant, Problem
from ringattn.benchmarks.suites.judge import RESULTS, Judge
from ringattn.benchmarks.suites.kernel_work import sampled_results
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.ranks import LocalRanks, packed, unpacked
from ringattn.benchmarks.suites.rounds import Unit, half_interval
from ringattn.benchmarks.suites.settings import ALL_METHODS, Settings, load_settings
from ringattn.benchmarks.suites.worker import PASSES

RIVALS = "tests.benchmarks.rivals"
SMALL = Problem(mask="documents_causal", seq_len=128, head_dim=8)


@pytest.fixture(scope="module")
def local():
    """Ranks of this host that all tests of the module share."""
    with ExitStack() as stack:
        yield LocalRanks(stack, "cpu", 1, 100.0)


@pytest.fixture
def settings() -> Settings:
    """One mask, two ranks, a tiny shape."""
    overrides = [
        "common.masks=[documents_causal]", "common.ranks=[2]", "common.head_dim=8",
        "methods.seq_len=[128]", "masks.seq_len=[128]", "kernels.seq_len=[128]",
        "kernels.kernels=[cpu_flash,matmul,fa3]", "kernels.seconds=0.001",
        "scaling.weak=[64]", "scaling.strong=[128]", "scaling.masks=[causal]",
    ]  # fmt: skip
    return load_settings("smoke", overrides)


def silent() -> Progress:
    return Progress(io.StringIO())


def unit(
    settings: Settings, local: LocalRanks, out: Path, entrants: list[Entrant], world: int = 2
) -> Unit:
    return Unit("methods", settings, local, Recorder(out), SMALL, world, entrants)


def test_every_cell_is_recorded_once(settings: Settings, local: LocalRanks, tmp_path: Path) -> None:
    out = tmp_path / "methods.jsonl"
    methods_suite.run(settings, Recorder(out), silent(), local)
    records = read_records(out)
    cells = {(r.config["contender"], r.config["method"], r.config["direction"]) for r in records}
    peers = {e.contender for e in attention_suite.entrants_of(settings.common, (), 2)}
    assert {c for c in cells if c[0] == OURS} == {
        (OURS, method, direction) for method in ALL_METHODS for direction in DIRECTIONS
    }
    assert {c[0] for c in cells} == {OURS, *peers}
    assert len(records) == len(cells) == len({r.case for r in records})
    for record in records:
        assert record.status != "error", record.reason
        if record.config["contender"] != OURS:
            continue
        figures = record.figures
        assert record.value == figures["tflops"]
        assert figures["area"] == SMALL.area
        flops = SMALL.flops(record.config["direction"])
        seconds, tflops = figures["seconds"], figures["tflops"]
        assert seconds is not None
        assert tflops == pytest.approx(flops / 2 / seconds / 1e12)
        assert {"wire_bytes", "peak_bytes", "exposed_share", "cpu_seconds", "cpu_ratio"} <= set(
            figures
        )
    # What is there is not measured again, and nothing is missing of what is not.
    before = out.read_text()
    methods_suite.run(settings, Recorder(out), silent(), local)
    assert out.read_text() == before
    lines = before.splitlines(keepends=True)
    out.write_text("".join(lines[:-3]))
    methods_suite.run(settings, Recorder(out), silent(), local)
    assert {r.case for r in read_records(out)} == {r.case for r in records}


def test_the_wire_is_what_the_plan_says(
    settings: Settings, local: LocalRanks, tmp_path: Path
) -> None:
    entrants = [Entrant(method=method, layout="auto") for method in ("ring", "direct", "ulysses")]
    outcomes = unit(settings, local, tmp_path / "out", entrants).measure(
        Judge(SMALL, "cpu", 2048), silent()
    )
    context = ra.ContextParallel(
        2, heads=SMALL.heads, head_dim=SMALL.head_dim, dtype=torch.float32, method="ring"
    )
    plan = context.plan(SMALL.built())
    for outcome in outcomes:
        assert outcome.status == "ok", outcome.reason
        for checked in outcome.checked:
            assert {name: checked["received"][name] for name in PASSES} == checked["planned"]
        assert any(checked["received"]["forward"] for checked in outcome.checked)
    ring = outcomes[0].checked
    assert [c["received"]["forward"] for c in ring] == [plan.bytes(r, "forward") for r in range(2)]


def test_a_plan_that_miscounts_is_an_error() -> None:
    from ringattn.benchmarks.suites.rounds import _wire_gap

    planned, received = {"forward": 8, "backward": 8}, {"forward": 8, "backward": 9}
    assert _wire_gap([{"planned": planned, "received": planned}]) == ""
    assert _wire_gap([{"planned": None, "received": received}]) == ""
    gap = _wire_gap([{"planned": planned, "received": received}])
    assert "backward on rank 0" in gap


def test_a_failing_contender_costs_its_own_cell(
    settings: Settings, local: LocalRanks, tmp_path: Path
) -> None:
    names = ("WRONG", "REFUSES", "RAISES", "DIES")
    rivals = [Entrant(contender=f"{RIVALS}:{name}") for name in names]
    ring, direct = (Entrant(method=method, layout="auto") for method in ("ring", "direct"))
    out = tmp_path / "methods.jsonl"
    judge = Judge(SMALL, "cpu", 2048)
    found = unit(settings, local, out, [ring, *rivals, direct]).measure(judge, silent())
    assert [o.status for o in found] == ["ok", "error", "refused", "error", "error", "ok"]
    reasons = {o.entrant.contender.partition(":")[2]: o.reason for o in found}
    assert "wrong result" in reasons["WRONG"]
    assert "dq" in reasons["WRONG"]
    assert reasons["REFUSES"] == "it is never able"
    assert "this one raises" in reasons["RAISES"]
    assert "died" in reasons["DIES"]
    records = read_records(out)
    assert len(records) == 3 * len(found)
    assert {r.status for r in records if r.config["contender"] == OURS} == {"ok"}


def test_lack_of_memory_is_said_first() -> None:
    from ringattn.benchmarks.suites.rounds import _about

    assert _about("rank 0: OutOfMemoryError: CUDA out of memory.").startswith("out of memory: rank")
    assert _about("rank 0: ValueError: x") == "rank 0: ValueError: x"


def test_the_other_suites_record_their_cells(
    settings: Settings, local: LocalRanks, tmp_path: Path
) -> None:
    settings = replace(settings, common=replace(settings.common, peers=False))
    kernels, masks, scaling = (Recorder(tmp_path / name) for name in ("k", "m", "s"))
    kernels_suite.run(settings, kernels, silent(), local)
    found = {(r.config["kernel"], r.config["direction"]): r for r in read_records(tmp_path / "k")}
    assert len(found) == 3 * len(DIRECTIONS)
    assert {found["matmul", d].status for d in DIRECTIONS} == {"ok"}
    assert {found["fa3", d].status for d in DIRECTIONS} == {"refused"}
    assert set(found["cpu_flash", "both"].figures) >= {f"error_{name}" for name in RESULTS}
    masks_suite.run(settings, masks, silent(), local)
    assert [r.config["method"] for r in read_records(tmp_path / "m")] == ["auto"] * 3
    measured_scaling.run(settings, scaling, silent(), local)
    lengths = {(r.config["scaling"], r.config["seq_len"]) for r in read_records(tmp_path / "s")}
    assert lengths == {("weak", 128), ("strong", 128)}


@pytest.mark.parametrize("mask", ["documents_causal", "per_head", "routed", "block_groups"])
def test_the_judge_tells_right_from_wrong_whole_or_sampled(mask: str) -> None:
    problem = replace(SMALL, mask=mask, seq_len=512)
    q, k, v, dout = problem.inputs()
    want = ra.reference(q, k, v, problem.built(), dout)
    results = {name: getattr(want, name) for name in RESULTS}
    order = np.random.default_rng(0).permutation(512)
    for whole in (512, 256):
        judge = Judge(problem, "cpu", whole)
        assert (judge.sample is None) == (whole == 512)
        shuffled = {name: value[:, torch.from_numpy(order)] for name, value in results.items()}
        halves = [
            sampled_results(order[a:b], {n: x[:, a:b] for n, x in shuffled.items()}, judge.sample)
            for a, b in ((0, 200), (200, 512))
        ]
        errors = judge.errors(halves)
        assert set(errors) == set(RESULTS)
        assert max(errors.values()) < 1e-6
        assert judge.wrong(errors) == ""
        missing = judge.errors(halves[:1])
        assert "out" in judge.wrong(missing)
        off = [{**half, "dk": {**half["dk"], "values": 1.01 * half["dk"]["values"]}}
               for half in halves]  # fmt: skip
        assert judge.errors(off)["dk"] == pytest.approx(0.01, rel=1e-3)
        assert "dk" in judge.wrong(judge.errors(off))


def test_answers_travel_as_bytes_without_pickle() -> None:
    answer = {"results": {"out": {"tokens": np.arange(3), "values": np.full((3, 2), -np.inf)}},
              "planned": {"forward": 3}, "note": "x", "sent": None}  # fmt: skip
    again = unpacked(packed(answer))
    assert again["planned"] == {"forward": 3}
    assert again["sent"] is None
    assert np.isneginf(again["results"]["out"]["values"]).all()
    assert again["results"]["out"]["tokens"].tolist() == [0, 1, 2]


def test_a_job_that_dies_costs_the_cell_it_was_at(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "methods.jsonl")
    cases = {"x": {"mask": "causal"}}
    with marker.marked(recorder, True, "bench.methods", "TFLOP/s", cases):
        left = (tmp_path / "methods.running").read_text()
    marker.blame(recorder)
    assert not read_records(recorder.path)
    (tmp_path / "methods.running").write_text(left)  # as a killed process leaves it
    marker.blame(recorder)
    (record,) = read_records(recorder.path)
    assert (record.status, record.case, record.config) == ("error", "x", cases["x"])
    assert not (tmp_path / "methods.running").exists()


def test_a_retry_keeps_figures_alone(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.jsonl")
    recorder.ok("n", "good", 1.0, "s")
    recorder.error("n", "bad", "s", "why")
    recorder.refused("n", "no", "s", "why")
    keep_figures(recorder.path)
    assert [r.case for r in read_records(recorder.path)] == ["good"]


def test_problems_travel_as_json_values() -> None:
    from ringattn.benchmarks.suites.worker import _problem

    fields = asdict(SMALL) | {"heads": list(SMALL.heads)}
    assert _problem(fields) == SMALL


def test_a_median_is_sure_when_its_interval_is_narrow() -> None:
    rng = np.random.default_rng(0)
    assert half_interval(np.ones(5)) == np.inf
    assert half_interval(np.ones(9)) == 0
    wide, narrow = (half_interval(1 + 0.1 * rng.standard_normal(n)) for n in (9, 400))
    assert narrow < 0.02 < wide


def test_repeatability_compares_what_two_files_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, ratios: dict[str, float]) -> str:
        recorder = Recorder(tmp_path / name)
        for case, ratio in ratios.items():
            recorder.ok(
                "bench.methods", case, 1.0, "TFLOP/s", figures={"cpu_ratio": ratio},
                config={"direction": "both", "suite": "methods", "ranks": 2},
            )  # fmt: skip
        return str(tmp_path / name)

    first = write("a", {"x": 1.0, "y": 0.5, "alone": 1.0})
    near, far = write("b", {"x": 1.02, "y": 0.49}), write("c", {"x": 1.05, "y": 0.5})
    assert repeatability.main([first, near]) == 0
    assert repeatability.main([first, far]) == 1
    assert "5.00%" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        repeatability.main([first, write("d", {"z": 1.0})])
    assert caught.value.code == 2


def test_a_hanging_rank_is_given_up(
    settings: Settings, local: LocalRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_timeout", 0.0)
    ring = Entrant(method="ring", layout="auto")
    (outcome,) = unit(settings, local, tmp_path / "out", [ring]).measure(
        Judge(SMALL, "cpu", 2048), silent()
    )
    assert outcome.status == "error"
    assert "no answer" in outcome.reason

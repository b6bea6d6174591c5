"""The kernel benchmark: its masks and cases, its reference, and the command from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.benchmarks import (
    kernel_bars,
    kernel_cases,
    kernel_measure,
    kernel_report,
    kernels,
)
from ringattn.benchmarks.kernel_cases import LENGTHS, SUBSETS, Case, selected, subset
from ringattn.benchmarks.kernel_masks import KEPT, LEAST, NAMES, mask_named
from ringattn.benchmarks.kernel_measure import Bench, timed_passes
from ringattn.benchmarks.kernel_reference import Sample, allowed_pairs, reference
from ringattn.benchmarks.kernel_results import read_results
from ringattn.benchmarks.record import Recorder, read_records
from ringattn.errors import UserError
from ringattn.kernels import MatmulKernel
from ringattn.kernels.measured import Table
from ringattn.workload import work_of

OUTPUTS = ("out", "dq", "dk", "dv")
TINY = ["--lengths", str(LEAST), "--seconds", "0.001"]


@pytest.mark.parametrize("seq_len", [LEAST, *LENGTHS])
@pytest.mark.parametrize("name", NAMES)
def test_every_mask_exists_at_every_length(name: str, seq_len: int) -> None:
    mask = mask_named(name, seq_len)
    assert mask.seq_len == seq_len
    assert 0 < mask.area <= seq_len**2
    context = ra.ContextParallel(
        1, heads=(64, 8), head_dim=128, method="ring", layout="contiguous"
    )  # fmt: skip
    plan = context.plan(mask)
    assert len(plan.forward.tasks) <= 20_000
    work = work_of(plan.forward, 0)
    assert work is not None
    assert work.flops == 4 * 128 * 64 * mask.area


@pytest.mark.parametrize("name", ["blocks_uniform", "blocks_variable"])
@pytest.mark.parametrize("seq_len", [4096, 32768])
def test_a_tenth_of_the_blocks_is_kept(name: str, seq_len: int) -> None:
    (matrix,) = mask_named(name, seq_len).matrices
    assert matrix.allowed is not None
    most = round(KEPT * matrix.allowed.shape[1])
    assert (matrix.allowed.sum(1) == most).all()
    assert np.diff(matrix.q_edges).min() >= 128
    assert np.diff(matrix.k_edges).min() >= 128


@pytest.mark.parametrize("name", ["documents_causal_4k", "shared_question_4k"])
def test_documents_have_4k_tokens_in_the_mean(name: str) -> None:
    sizes = np.diff([0, *np.unique(mask_named(name, 131072).bands["q1"])])
    assert 3000 < sizes.mean() < 5200


def test_subsets_begin_with_what_matters_and_hold_no_case_twice() -> None:
    for name in SUBSETS:
        cases = subset(name)
        assert len(cases) == len({str(case) for case in cases}) == len(set(cases))
    headline, whole = subset("headline"), subset("all")
    assert headline[0] == Case("causal", 32768)
    assert whole[: len(headline)] == headline
    product = {(c.mask, c.seq_len, c.heads, c.head_dim) for c in whole}
    assert len([p for p in product if p[3][0] == p[3][1]]) == len(NAMES) * 8 * 3 * 3


def test_filters_keep_what_is_asked_for_and_refuse_what_is_not_there() -> None:
    cases = subset("all")
    kept = selected(cases, masks=["causal"], lengths=[4096], heads=["16:2"], head_dims=[64])
    assert kept == [Case("causal", 4096, (16, 2), (64, 64))]
    (single,) = selected(kept, dtype="float16")
    assert single.dtype == "float16"
    with pytest.raises(UserError, match="lengths"):
        selected(cases, lengths=[1000])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_sampled_reference_agrees_with_the_dense_one(
    name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    mask, scale = mask_named(name, LEAST), 0.25

    def normal(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(1, LEAST, heads, dim, generator=generator).to(dtype)

    inputs = normal(4, 16), normal(2, 16), normal(2, 8), normal(4, 8)
    q, k, v, dout = inputs
    want = ra.reference(q, k, v, mask, dout, scale=scale)
    found = reference(mask, *inputs, scale, Sample.draw(LEAST, (4, 2), seed=1))
    for output in OUTPUTS:
        exact = getattr(want, output)
        assert found.error(output, exact) < (1e-12 if dtype == torch.float64 else 1e-5)
        assert found.error(output, exact * 1.01) == pytest.approx(0.01, rel=1e-2)


def test_allowed_pairs_follow_strides_and_samples() -> None:
    mask = ra.masks.from_bands(100, [(1, 90, 0, 99, -20, 30, 3), (0, 90, 2, 99, -50, 5, 3)])
    rng = np.random.default_rng(0)
    rows, keys = (np.sort(rng.choice(100, 40, replace=False)) for _ in range(2))
    found = allowed_pairs(mask, rows, keys, torch.device("cpu"))
    assert (found.numpy() == mask.dense()[np.ix_(rows, keys)]).all()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small cases in place of a subset, and the CPU for a device."""
    small = {"seq_len": LEAST, "heads": (4, 2), "head_dim": (16, 16)}
    cases = [Case(mask, dtype="float32", **small) for mask in ("causal", "blocks_uniform")]
    monkeypatch.setattr(kernel_cases, "subset", lambda _: cases)


def run(out: Path, *arguments: str) -> None:
    threads = torch.get_num_threads()
    kernels.main(["--out", str(out), "--device", "cpu", *TINY, *arguments])
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("tiny")
def test_the_command_measures_resumes_reports_and_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "kernels.jsonl"
    run(out, "--minutes", "0", "--kernels", "cpu_flash", "matmul")
    assert "4 measurements of 2 cases left" in capsys.readouterr().out
    assert not read_records(out)
    run(out, "--masks", "causal", "--kernels", "cpu_flash")
    first = read_records(out)
    assert [r.config["direction"] for r in first] == ["forward", "backward"]
    run(out, "--kernels", "cpu_flash", "matmul")
    records = read_records(out)
    assert [r.to_json() for r in records[:2]] == [r.to_json() for r in first]
    assert len(records) == len({r.case for r in records}) == 2 * 2 * 2
    for record in records:
        assert record.status == "ok", record.reason
        assert record.value is not None
        assert record.value > 0
        assert record.unit == "TFLOP/s"
        assert max(record.config["errors"].values()) < 1e-4
        wanted = {"out"} if record.config["direction"] == "forward" else {"dq", "dk", "dv"}
        assert set(record.config["errors"]) == wanted
    causal = next(r for r in records if r.config["mask"] == "causal")
    assert causal.config["flops"] == 4 * 16 * 4 * LEAST * (LEAST + 1) // 2
    run(out, "--kernels", "cpu_flash", "matmul")
    assert len(read_records(out)) == len(records)
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| causal |" in text
    assert "cpu_flash" in text
    assert out.with_suffix(".png").stat().st_size > 1000
    assert not out.with_suffix(".running").exists()

    table = tmp_path / "measured.json"
    run(out, "--write-table", str(table))
    made = Table.from_json(table.read_text(encoding="utf-8"))
    assert len(made.rows) == 4
    assert all(set(row.tflops) == {"cpu_flash", "matmul"} for row in made.rows)
    plan = Bench(Case("causal", LEAST, (4, 2), (16, 16), "float32"), torch.device("cpu")).plan
    work = work_of(plan.backward, 0)
    assert work is not None
    nearest = min(made.rows, key=lambda row: row.work.distance(work))
    assert nearest.work.distance(work) < 1e-3
    run(out, "--write-table", str(table))
    assert Table.from_json(table.read_text(encoding="utf-8")) == made


class Broken(MatmulKernel):
    """A kernel that fails as it is told to."""

    how = ""

    def refusal(self, **inputs) -> str | None:
        return "is refused" if self.how == "refusal" else None

    def prepare(self, *arguments, **options):
        if self.how == "tiles":
            raise UserError("tiles", "are refused", "none")
        return super().prepare(*arguments, **options)

    def forward(self, q, k, v, prepared, out, lse, **options) -> None:
        if self.how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().forward(q, k, v, prepared, out, lse, **options)

    def backward(self, *arguments, **options) -> None:
        if self.how == "crash":
            raise RuntimeError("misaligned")
        super().backward(*arguments, **options)
        if self.how == "wrong":
            arguments[8].mul_(1.1)  # dk
        if self.how == "nan":
            arguments[7].fill_(torch.nan)  # dq


FAILURES = [
    ("refusal", "refused", "refused", "is refused"),
    ("tiles", "refused", "refused", "are refused"),
    ("memory", "error", "error", "out of memory"),
    ("crash", "ok", "error", "misaligned"),
    ("wrong", "ok", "error", "dk is off by 0.1"),
    ("nan", "ok", "error", "dq is off by nan"),
]


@pytest.mark.parametrize(("how", "forward", "backward", "reason"), FAILURES)
@pytest.mark.usefixtures("tiny")
def test_failures_are_recorded_with_reasons_and_the_rest_goes_on(
    how: str, forward: str, backward: str, reason: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Broken, "how", how)
    monkeypatch.setattr(kernels, "kernel_by_name", lambda name: Broken())
    monkeypatch.setattr("ringattn.plan.kernel_by_name", lambda name: Broken())
    out = tmp_path / "kernels.jsonl"
    run(out, "--kernels", "matmul")
    if how == "refusal":
        assert "matmul refuses 2 cases: is refused" in capsys.readouterr().out
    records = read_records(out)
    assert [r.status for r in records] == [forward, backward] * 2
    assert all(reason in r.reason for r in records if r.status != "ok")
    assert reason in out.with_suffix(".md").read_text(encoding="utf-8")
    monkeypatch.setattr(Broken, "how", "")
    run(out, "--kernels", "matmul")
    assert len(read_records(out)) == 4
    run(out, "--kernels", "matmul", "--retry")
    (results,) = read_results(out)
    again = [r.status for r in results.records.values()]
    assert again == ["ok"] * 4


@pytest.mark.usefixtures("tiny")
def test_a_measurement_that_ended_the_process_is_not_repeated(tmp_path: Path) -> None:
    out = tmp_path / "kernels.jsonl"
    runner = kernels.Runner(out, torch.device("cpu"))
    case = kernel_cases.subset("")[0]
    measurement = runner.run(case, Bench(case, torch.device("cpu"), 0.001), "matmul")
    next(measurement)  # the forward is recorded; the process ends in the backward
    assert runner.marker.exists()
    names = json.loads(runner.marker.read_text(encoding="utf-8"))[2]
    again = kernels.Runner(out, torch.device("cpu"))
    assert again.missing(case, "matmul") == ()
    forward, backward = read_records(out)
    assert (forward.status, backward.status) == ("ok", "error")
    assert backward.case == names["backward"]
    assert "process ended" in backward.reason
    assert not again.marker.exists()


@pytest.mark.parametrize(("seconds", "long", "count"), [(0.0, 9, 3), (0.0, 0, 1), (60, 9, 100)])
def test_a_long_run_is_repeated_less_often(
    seconds: float, long: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_measure, "LONG", long)
    calls: list[str] = []
    timing = timed_passes(
        lambda: calls.append("run" * 10_000), lambda: calls.append("reset"),
        torch.device("cpu"), seconds,
    )  # fmt: skip
    assert len(timing.seconds) == count
    assert calls[-2:] == ["reset", "run" * 10_000]  # what the last repetition left is the result


RATES = {"triton": (500.0, 400.0), "fa3": (600.0, 800.0), "flex": (400.0, 250.0)}


def test_bars_are_judged_on_what_is_there(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "kernels.jsonl")
    for mask in ("causal", "window_causal"):
        case = Case(mask, 32768)
        bench = Bench(case, torch.device("cpu"))
        for kernel, rates in RATES.items():
            for direction, rate in zip(("forward", "backward"), rates):
                names = ("out",) if direction == "forward" else ("dq", "dk", "dv")
                worse = 1.2 if kernel == "triton" and direction == "backward" else 1.0
                config = {
                    **bench.config(direction), "kernel": kernel, "architecture": "sm_90",
                    "errors": dict.fromkeys(names, 2e-3 * worse),
                    "workspace_bytes": 10**9,
                }  # fmt: skip
                share = 0.6 if mask == "window_causal" else 1.0
                name = f"{case}-{direction}-{kernel}"
                recorder.ok("kernels", name, rate * share, "TFLOP/s", config=config)
    (results,) = read_results(recorder.path)
    found = {(v.what, v.case, v.direction): v for v in kernel_bars.verdicts(results)}
    causal, window = str(Case("causal", 32768)), str(Case("window_causal", 32768))

    def judged(what: str, case: str, direction: str) -> tuple[float | None, bool | None]:
        verdict = found[what, case, direction]
        return verdict.value and round(verdict.value, 3), verdict.met

    assert judged("triton / fa3", causal, "forward") == (0.833, True)
    assert judged("triton / fa3", causal, "backward") == (0.5, False)
    assert judged("triton / its dense rate", window, "forward") == (0.6, False)
    assert judged("triton / its dense rate", window, "backward") == (0.6, True)
    assert judged("triton / flex", window, "forward") == (1.25, False)
    assert judged("triton / library", str(Case("full", 65536)), "forward") == (None, None)
    assert judged("error of dq: triton / library, worst", causal, "backward") == (1.2, False)
    assert judged("error of out: triton / library, worst", causal, "forward") == (1.0, True)
    text = kernel_report.report(results)
    assert "678 / 585" in text
    assert "500 / 400" in text
    assert "**fail**" in text


@pytest.mark.gpu
def test_a_gpu_measures_speed_and_memory(tmp_path: Path) -> None:
    case = Case("documents_causal", 1024, (4, 2), (64, 64))
    bench = Bench(case, torch.device("cuda"), 0.01)
    found = list(bench.measure(MatmulKernel(), ("forward", "backward")))
    for outcome in found:
        assert outcome.status == "ok", outcome.reason
        assert outcome.figures["workspace_bytes"] >= 0
        assert outcome.figures["repetitions"] >= 1

"""The GPU session without a GPU: stages that pass, fail, hang and are started again."""

import sys
from pathlib import Path

import pytest
import torch

from ringattn.benchmarks import gpu_session
from ringattn.benchmarks.gpu_session import SHARES, Step, errors_in, run_stage, stages
from ringattn.benchmarks.kernel_measure import LOST
from ringattn.benchmarks.record import Recorder


def python(text: str) -> Step:
    return Step(lambda seconds: [sys.executable, "-c", text])


def test_every_stage_has_a_share_and_writes_into_the_folder(tmp_path: Path) -> None:
    made = stages(tmp_path)
    assert list(made) == list(SHARES)
    for step in (step for steps in made.values() for step in steps):
        command = step.command(60.0)
        assert command[0] == sys.executable
        assert all(isinstance(word, str) for word in command)
        assert step.wrote is None or step.wrote.parent == tmp_path
    (kernels,) = made["kernels"]
    assert "--minutes 1.0" in " ".join(kernels.command(60.0))


def test_a_failing_session_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second stage hangs with a child process, and is ended with it."""
    hang = (
        "import os, subprocess, sys, time; print(os.environ['TRITON_INTERPRET'], flush=True);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    )
    made = {
        "check": [python("raise SystemExit(7)"), python("print('second step')")],
        "tune": [python(hang)],
        "kernels": [python("print('fine')")],
    }
    monkeypatch.setattr(gpu_session, "stages", lambda out: made)
    monkeypatch.setattr(gpu_session, "LEAST", 0.0)
    monkeypatch.setattr(gpu_session, "SHARES", {"check": 0.45, "tune": 0.05, "kernels": 0.5})
    outcomes = gpu_session.run(list(made), (gpu_session.RESERVE + 60) / 60, tmp_path)
    assert [o.reason for o in outcomes] == ["exit status 7", "timed out", ""]
    assert "second step" in (tmp_path / "gpu_check.log").read_text()
    assert "\n0\n" in (tmp_path / "gpu_tune.log").read_text()
    last = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:2] for line in last] == [
        ["check", "FAILED"], ["tune", "FAILED"], ["kernels", "passed"],
    ]  # fmt: skip
    assert str(tmp_path / "gpu_kernels.log") in last[2]


def test_a_lost_context_starts_the_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "LEAST", 0.0)
    seen = tmp_path / "seen"
    text = (
        f"from pathlib import Path; seen = Path({str(seen)!r}); first = not seen.exists();"
        f"seen.touch(); raise SystemExit({LOST} if first else 0)"
    )
    step = Step(lambda seconds: [sys.executable, "-c", text], again=True, wrote=seen)
    outcome = run_stage("tune", [step], 30.0, tmp_path)
    assert (outcome.reason, outcome.wrote) == ("", (tmp_path / "gpu_tune.log", seen))
    seen.unlink()
    once = run_stage("tune", [Step(step.command)], 30.0, tmp_path)
    assert once.reason == f"exit status {LOST}"


def test_errors_in_records_fail_a_stage(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert errors_in(path) == "nothing was measured"
    recorder = Recorder(path)
    recorder.ok("kernels", "a", 1.0, "TFLOP/s")
    recorder.refused("kernels", "b", "TFLOP/s", "cannot")
    assert errors_in(path) == ""
    recorder.error("kernels", "c", "TFLOP/s", "wrong result")
    assert errors_in(path) == "1 of 3 are errors: c: wrong result"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        gpu_session.main([])
    assert ended.value.code == 2
    assert "device=cpu: a GPU session needs a CUDA device" in capsys.readouterr().err

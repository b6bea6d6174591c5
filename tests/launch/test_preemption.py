"""A scheduler's signal: the state is saved, the exit code is 0, and the same command goes on."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ringattn.launch.checkpoint import find_checkpoints
from ringattn.launch.metrics import METRICS_FILE, read_lines
from tests.launch.training import (
    assert_parity,
    command,
    finish,
    run_command,
    tiny_values,
    train_pooled,
    uneven_corpus,
    write_config,
)

STEPS = 12
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of the run when nobody disturbs it."""
    return train_pooled(_values(corpus, tmp_path_factory.mktemp("undisturbed") / "run"))


def _values(corpus: Path, run_dir: Path, **overrides: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train__steps": STEPS,
        "train__log_every": 1,
        "parallel__cp": 2,
        "run__timeout_s": 30.0,
    }
    return tiny_values(corpus, run_dir, **(settings | overrides))


def _signal_at_step(process: subprocess.Popen[str], step: int, number: int) -> None:
    """Signals the command once it has shown a step."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            os.kill(process.pid, number)
            return
    raise AssertionError(f"step {step} was never shown")


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.full)],
    ids=["SIGUSR1", "SIGTERM"],
)
def test_a_signal_saves_and_ends_in_order(
    number: signal.Signals, corpus: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = str(write_config(tmp_path / "config.yaml", _values(corpus, tmp_path / "run")))
    process = command("train", config)
    _signal_at_step(process, 3, number)
    code, _, err = finish(process)
    assert code == 0, err
    (stored,) = find_checkpoints(tmp_path / "run")
    step = int(stored.name.removeprefix("step-"))
    assert 3 <= step < STEPS
    assert f"stopped after step {step} ({number.name})" in err
    code, _, err = run_command("train", config)
    assert code == 0, err
    got = read_lines(tmp_path / "run" / METRICS_FILE)
    assert [line["loss"] for line in got] == [line["loss"] for line in undisturbed]


@pytest.mark.full
def test_torchrun_passes_the_signal_on(corpus: Path, tmp_path: Path) -> None:
    """torchrun itself does not end with 0, but the state is saved."""
    config = str(write_config(tmp_path / "config.yaml", _values(corpus, tmp_path / "run")))
    process = command("train", config, launcher=TORCHRUN)
    _signal_at_step(process, 3, signal.SIGTERM)
    _, _, err = finish(process)
    assert find_checkpoints(tmp_path / "run"), err


@pytest.mark.full
def test_a_job_that_lost_a_node_goes_on_with_the_others(
    corpus: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Two ranks stop; one goes on with the same packs."""
    values = _values(corpus, tmp_path / "run", parallel__elastic=True)
    config = str(write_config(tmp_path / "config.yaml", values))
    process = command("train", config, launcher=TORCHRUN)
    _signal_at_step(process, 3, signal.SIGTERM)
    finish(process)
    code, _, err = run_command("train", config, launcher=(*TORCHRUN[:-1], "1"))
    assert code == 0, err
    assert "1 ranks in place of 2: cp 2 -> 1" in err
    assert_parity(undisturbed, read_lines(tmp_path / "run" / METRICS_FILE))

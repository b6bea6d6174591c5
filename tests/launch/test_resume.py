"""A run that was killed and resumed is the run that was never disturbed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.launch.checkpoint import find_checkpoints, read_state
from ringattn.launch.metrics import METRICS_FILE, read_lines
from tests.launch.checkpoints import comparable, stored_tensors
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 20 steps at cp = 2 with a checkpoint every 5 steps."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_pooled(
        tiny_values(corpus, run_dir, parallel__cp=2, checkpoint__every=5, checkpoint__keep=0)
    )
    return run_dir


@pytest.mark.full
def test_killed_and_resumed_is_bitwise_equal(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL of the command between checkpoints; the same command again finishes the run.

    The save after step 10 has waited for the one after step 5, so that one is complete at least.
    """
    run_dir = tmp_path / "run"
    values = tiny_values(
        corpus, run_dir, parallel__cp=2, checkpoint__every=5, checkpoint__keep=0, train__log_every=1
    )
    config = str(write_config(tmp_path / "config.yaml", values))
    process = command("train", config)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 12/"):
            os.killpg(process.pid, signal.SIGKILL)
            break
    finish(process)
    assert len(read_lines(run_dir / METRICS_FILE)) < 20
    code, _, err = run_command("train", config)
    assert code == 0, err
    # It continued: a later step than the first is the first one shown.
    shown = [int(line.split()[1].split("/")[0]) for line in err.splitlines() if "tokens/s" in line]
    assert shown[0] in (6, 11, 16)
    want = comparable(read_lines(undisturbed / METRICS_FILE))
    assert comparable(read_lines(run_dir / METRICS_FILE)) == want
    for step in (10, 20):
        name = f"checkpoints/step-{step:06d}"
        expected, got = stored_tensors(undisturbed / name), stored_tensors(run_dir / name)
        assert expected.keys() == got.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, got[key]), f"step {step}: {key}"


@pytest.mark.parametrize(
    "mesh",
    [{"parallel.cp": 1}, {"parallel.cp": 4}, {"train.accumulate": 1, "parallel.cp": 2}],
    ids=["cp1", "cp4", "cp2"],
)
def test_resumed_at_another_cp(
    mesh: dict[str, Any], corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    checkpoint = undisturbed / "checkpoints" / "step-000010"
    values = tiny_values(corpus, tmp_path / "run", checkpoint__resume=str(checkpoint)) | mesh
    expected = read_lines(undisturbed / METRICS_FILE)[10:]
    got = train_pooled(values)
    assert_parity(expected, got)
    if mesh["parallel.cp"] == 2:
        assert comparable(got) == comparable(expected)


def test_position_in_the_data_survives_another_dp(corpus: Path, tmp_path: Path) -> None:
    """Two packs per step on one rank, then one per step: no pack is read twice or left out."""
    values = tiny_values(corpus, tmp_path / "run", train__accumulate=2, train__steps=6)
    train_pooled(values)
    assert read_state(find_checkpoints(tmp_path / "run")[-1]).position == 12 * 160
    values |= {"train.accumulate": 1, "train.steps": 8}
    train_pooled(values)
    assert read_state(find_checkpoints(tmp_path / "run")[-1]).position == 14 * 160
    assert [line["step"] for line in read_lines(tmp_path / "run" / METRICS_FILE)] == [*range(1, 9)]


def test_old_checkpoints_are_removed_and_leftovers_too(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    leftover = run_dir / "checkpoints" / ".step-000002.partial"
    leftover.mkdir(parents=True)
    values = tiny_values(corpus, run_dir, train__steps=8, checkpoint__every=2, checkpoint__keep=2)
    train_pooled(values)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-000006", "step-000008"]


def test_resume_never_sets_the_old_run_aside(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = train_pooled(tiny_values(corpus, run_dir, train__steps=3))
    values = tiny_values(corpus, run_dir, train__steps=2, checkpoint__resume="never", seed=8)
    second = train_pooled(values)
    assert [path.name for path in find_checkpoints(run_dir)] == ["step-000002"]
    assert read_lines(run_dir / "previous-1" / METRICS_FILE) == first
    assert [line["step"] for line in second] == [1, 2]


def test_state_names_what_it_is_about(undisturbed: Path) -> None:
    newest = find_checkpoints(undisturbed)[-1]
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == 20
    assert state["position"] == 20 * 160
    assert state["identity"]["seed"] == 7
    assert state["identity"]["model.layers"] == 2

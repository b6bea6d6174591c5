"""A run that is killed again and again is the run that was never disturbed.

Kills are drawn from seeds and carried out at moments that the machine's speed decides. What they
leave behind is checked at every kill: `tests/launch/chaos.py`.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints
from ringattn.launch.metrics import METRICS_FILE
from tests.grid import run_grid
from tests.launch.chaos import TORCHRUN, Chaos, Kill, Witness, assert_same_run, draw_kills
from tests.launch.training import tiny_values, train_pooled, uneven_corpus, write_config

WORLD, STEPS, KEEP = 2, 60, 3
RUNS, KILLS = 6, 5  # of the full run: so many runs of so many kills


def _values(corpus: Path, run_dir: Path, **overrides: Any) -> dict[str, Any]:
    settings = {
        "parallel__cp": WORLD, "train__steps": STEPS, "checkpoint__every": 2,
        "checkpoint__keep": KEEP, "train__log_every": 1, "train__deterministic": True,
    }  # fmt: skip
    return tiny_values(corpus, run_dir, **settings | overrides)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the undisturbed run, with all of its checkpoints."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_pooled(_values(corpus, run_dir, checkpoint__keep=0))
    return run_dir


def _disturb(
    folder: Path, corpus: Path, undisturbed: Path, kills: list[Kill], seed: int
) -> Witness:
    run_dir = folder / "run"
    values = _values(corpus, run_dir)
    chaos = Chaos(
        write_config(folder / "config.yaml", values), run_dir, undisturbed,
        steps=STEPS, keep=KEEP, world=WORLD, log=folder / "log.txt", seed=seed,
        launcher=(*TORCHRUN, str(WORLD), "--max-restarts", "100"),
    )  # fmt: skip
    found = chaos.run(kills)
    assert_same_run(run_dir, undisturbed)
    return found


def test_a_rank_killed_while_it_saves(
    corpus: Path, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    """The launcher starts the ranks again, and they go on by themselves."""
    found = _disturb(tmp_path, corpus, undisturbed, [Kill("save")], seed)
    assert len(found.at_kill) == 1
    assert found.seen


def _flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


BREAKS: dict[str, Callable[[Path], object]] = {
    "a bit is flipped": lambda step: _flip(next(step.glob("*.distcp"))),
    "a file is cut": lambda step: os.truncate(next(step.glob("*.distcp")), 500),
    "a file is gone": lambda step: next(step.glob("*.distcp")).unlink(),
    "the whole checkpoint is gone": shutil.rmtree,
    "an older one stands in its place": lambda step: shutil.copytree(
        step.with_name("step-000056"), step, dirs_exist_ok=True
    ),
}


@pytest.mark.parametrize("harm", BREAKS)
def test_a_witness_notices(harm: str, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    witness = Witness(tmp_path / "run", undisturbed, KEEP)
    witness.look()
    assert witness.at_kill == [STEPS]
    BREAKS[harm](tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}")
    with pytest.raises((AssertionError, UserError)):
        witness.look()


def test_a_witness_lets_old_checkpoints_go(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    witness = Witness(tmp_path / "run", undisturbed, KEEP)
    witness.look()
    for old in find_checkpoints(tmp_path / "run")[:-KEEP]:
        shutil.rmtree(old)
    witness.look()
    assert_same_run(tmp_path / "run", undisturbed)
    shutil.rmtree(find_checkpoints(tmp_path / "run")[0])
    with pytest.raises(AssertionError, match="is lost"):
        witness.look()


def test_another_loss_is_another_run(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    metrics = tmp_path / "run" / METRICS_FILE
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[7]["loss"] = math.nextafter(lines[7]["loss"], 9.0)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_many_kills(
    corpus: Path,
    undisturbed: Path,
    tmp_path_factory: pytest.TempPathFactory,
    grid_seconds: float | None,
) -> None:
    """Of ranks and of whole jobs, at any moment."""

    def check(case: dict[str, Any]) -> dict[str, float]:
        folder = tmp_path_factory.mktemp("disturbed")
        found = _disturb(
            folder, corpus, undisturbed, draw_kills(case["seed"], case["kills"]), case["seed"]
        )
        jobs = sum(kill.job for kill in draw_kills(case["seed"], case["kills"]))
        print(f"{case}: {jobs} of whole jobs, {found.partial} amid a save, {found.at_kill=}")
        return {"kills not carried out": case["kills"] - len(found.at_kill)}

    run_grid(
        "kills",
        [{"seed": seed, "kills": KILLS} for seed in range(RUNS)],
        check,
        tolerance=0.0,
        folders=("ringattn", "kernels", "parallel", "launch"),
        axes=("kills",),
        seconds=grid_seconds,
        note=f"Each case is a run of {STEPS} steps under torchrun with {KILLS} SIGKILLs of a rank "
        "or of the whole job, drawn from its seed: while ranks start, between steps and "
        "while a checkpoint is written. Metrics and the final checkpoint equal the undisturbed "
        "run's bit by bit, and so does the newest complete checkpoint at every kill.",
    )

"""Runs on another number of ranks than configured, and restarts."""

from pathlib import Path

import pytest

from ringattn.errors import UserError
from ringattn.launch import restart
from ringattn.launch.config import Config
from ringattn.launch.config_load import config_from_values
from ringattn.launch.elastic import describe_fit, fit_to_world
from ringattn.launch.restart import FolderClaim, resume_after_restart


def _config(dp: int, cp: int, accumulate: int = 1, elastic: bool = True) -> Config:
    return config_from_values(
        {
            "parallel.dp": dp,
            "parallel.cp": cp,
            "train.accumulate": accumulate,
            "parallel.elastic": elastic,
        }
    )


def test_a_fixed_run_must_fit_the_world() -> None:
    config = _config(dp=2, cp=3, elastic=False)
    assert fit_to_world(config, 6) is config
    with pytest.raises(UserError, match="parallel.cp=3: must divide the launcher's world size 4"):
        fit_to_world(config, 4)
    with pytest.raises(UserError, match="parallel.dp=2: dp × cp = 6 .* set parallel.dp=3"):
        fit_to_world(config, 9)


@pytest.mark.parametrize(
    "dp, cp, accumulate, world, fitted",
    [
        (4, 2, 1, 4, (2, 2, 2)),  # half of the nodes: twice the micro-batches
        (2, 2, 2, 8, (4, 2, 1)),  # twice the nodes
        (1, 4, 1, 2, (1, 2, 1)),  # less than one sequence's ranks
        (1, 4, 4, 6, (2, 3, 2)),  # dp may grow instead
        (2, 4, 3, 6, (2, 3, 3)),  # the next smaller cp
    ],
)
def test_an_elastic_run_reads_the_same_packs(
    dp: int, cp: int, accumulate: int, world: int, fitted: tuple[int, int, int]
) -> None:
    config = _config(dp, cp, accumulate)
    got = fit_to_world(config, world)
    assert (got.parallel.dp, got.parallel.cp, got.train.accumulate) == fitted
    assert got.world == world
    assert got.packs_per_step == config.packs_per_step
    assert describe_fit(config, got).startswith(f"{world} ranks in place of {dp * cp}: ")
    assert describe_fit(config, config) == ""


def test_a_restarted_job_goes_on_from_its_own_checkpoints(tmp_path: Path) -> None:
    config = config_from_values({"run.dir": str(tmp_path), "checkpoint.resume": "never"})
    first = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "a"}
    again = first | {"TORCHELASTIC_RESTART_COUNT": "2"}
    assert resume_after_restart(config, again) is config  # it had not opened the folder yet
    FolderClaim(tmp_path, first).release()
    assert resume_after_restart(config, again) is config  # nor saved anything there
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    assert resume_after_restart(config, first) is config
    assert resume_after_restart(config, again).checkpoint.resume == "auto"
    FolderClaim(tmp_path, first | {"TORCHELASTIC_RUN_ID": "b"}).release()
    assert resume_after_restart(config, again) is config


def test_two_jobs_do_not_share_a_run_folder(tmp_path: Path) -> None:
    mine = FolderClaim(tmp_path, {})
    with pytest.raises(UserError, match=r"another job trains there \(pid \d+ on host \S+\)"):
        FolderClaim(tmp_path, {})
    mine.check()
    mine.release()
    FolderClaim(tmp_path, {}).release()


def test_without_locks_the_later_job_has_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier one notices before it saves."""
    monkeypatch.setattr(restart, "_lock", lambda *_: None)
    mine, theirs = FolderClaim(tmp_path, {}), FolderClaim(tmp_path, {})
    theirs.check()
    with pytest.raises(UserError, match="another job has begun to write there"):
        mine.check()

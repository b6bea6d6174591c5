"""Equal training under every launcher."""

import base64
import json
import random
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from ringattn.launch.metrics import METRICS_FILE, read_lines
from tests.launch.training import command, finish, tiny_values, uneven_corpus, write_config

MPIEXEC = Path(sys.executable).with_name("mpiexec")
needs_mpi = pytest.mark.skipif(
    not MPIEXEC.exists(), reason="needs the mpiexec of the package mpich"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run that starts its own ranks."""
    return _losses(corpus, tmp_path_factory.mktemp("alone"), [{}])


def _losses(corpus: Path, folder: Path, ways: list[dict[str, Any]]) -> list[float]:
    """Losses of a tiny run on two ranks; each of `ways` starts a command of the same job."""
    values = tiny_values(
        corpus, folder / "run", train__steps=3, parallel__cp=2, train__deterministic=True
    )
    config = write_config(folder / "config.yaml", values)
    started = [command("train", str(config), **way) for way in ways]
    for code, out, err in [finish(process) for process in started]:
        assert code == 0, out + err
    lines = read_lines(folder / "run" / METRICS_FILE)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3
    return losses


@needs_mpi
def test_mpiexec_trains_as_alone(corpus: Path, alone: list[float], tmp_path: Path) -> None:
    assert _losses(corpus, tmp_path, [{"outer": (str(MPIEXEC), "-n", "2")}]) == alone


def _srun(port: int) -> list[dict[str, Any]]:
    """What srun does for two tasks of one node."""
    step = {
        "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": socket.gethostname(), "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        {"variables": step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}}
        for task in range(2)
    ]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _deepspeed(port: int) -> list[dict[str, Any]]:
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    return [
        {
            "launcher": (
                "-m", "deepspeed.launcher.launch", f"--world_info={world}",
                f"--master_port={port}", "--module",
            ),
            "program": ("ringattn.launch",),
            "variables": {"DS_ACCELERATOR": "cpu"},
        }
    ]  # fmt: skip


@pytest.mark.full
def test_srun_trains_as_alone(corpus: Path, alone: list[float], tmp_path: Path) -> None:
    assert _losses(corpus, tmp_path, _srun(_free_port())) == alone


@pytest.mark.full
def test_torchrun_trains_as_alone(corpus: Path, alone: list[float], tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert _losses(corpus, tmp_path, [{"launcher": launcher}]) == alone


@pytest.mark.full
def test_deepspeed_trains_as_alone(corpus: Path, alone: list[float], tmp_path: Path) -> None:
    assert _losses(corpus, tmp_path, _deepspeed(_free_port())) == alone


@needs_mpi
@pytest.mark.full
def test_a_mistake_under_mpiexec_is_told_once(corpus: Path, tmp_path: Path) -> None:
    """And nobody waits for an orderly end of MPI."""
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=4, run__timeout_s=600.0)
    config = write_config(tmp_path / "config.yaml", values)
    process = command("train", str(config), outer=(str(MPIEXEC), "-n", "2"))
    code, _, err = finish(process)
    assert code == 2, err
    assert err.count("ringattn: ") == 1
    assert "world size 2" in err

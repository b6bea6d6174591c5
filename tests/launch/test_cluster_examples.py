"""The example of a SLURM job does what it says, and the manifest is one."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from ringattn.launch.config_load import config_fields
from tests.launch.training import REPOSITORY

EXAMPLES = REPOSITORY / "docs" / "examples" / "cluster"

# srun stands for a step: it ends with its argument's code, or, as ranks do, with 0 once it is told.
SRUN = """#!/bin/bash
echo "$@" > "{folder}/srun"
if [[ "$4" == wait ]]; then
    trap 'exit 0' USR1
    while true; do
        kill -USR1 "$PPID" # again: the first one may come before the script knows its step
        read -r -t 1 <> "{folder}/never"
    done
fi
exit "$4"
"""
SCONTROL = """#!/bin/bash
echo "$@" > "{folder}/scontrol"
"""


def _run(folder: Path, argument: str) -> int:
    os.mkfifo(folder / "never")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("{folder}", str(folder)))
        path.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
    }
    command = ["bash", str(EXAMPLES / "slurm.sh"), argument, "train.steps=3"]
    return subprocess.run(command, env=environment).returncode


@pytest.mark.parametrize("code", [0, 3])
def test_the_job_ends_as_its_step(code: int, tmp_path: Path) -> None:
    assert _run(tmp_path, str(code)) == code
    started = (tmp_path / "srun").read_text().split()
    assert started == ["--kill-on-bad-exit=1", "ringattn", "train", str(code), "train.steps=3"]
    assert not (tmp_path / "scontrol").exists()


def test_a_job_that_runs_out_of_time_is_queued_again(tmp_path: Path) -> None:
    assert _run(tmp_path, "wait") == 0
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "17"]


def test_the_manifest() -> None:
    (job,) = yaml.safe_load_all((EXAMPLES / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    elastic, spec = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] <= spec["replicas"] <= elastic["maxReplicas"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert container["command"][:4] == ["torchrun", "-m", "ringattn.launch", "train"]
    assert {word.split("=")[0] for word in container["args"]} <= config_fields().keys()
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}

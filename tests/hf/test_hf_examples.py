"""The examples run, and learn."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "name, options",
    [
        ("train_transformers.py", []),
        pytest.param("train_accelerate.py", ["--cp", "1"], marks=pytest.mark.full),
        pytest.param("train_accelerate.py", [], marks=pytest.mark.full),
    ],
)
def test_example(name: str, options: list[str]) -> None:
    path = REPOSITORY / "docs" / "examples" / name
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(path), str(REPOSITORY / "README.md"), "--seq-len", "256", "--steps", "4", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert len(losses) == 4, done.stdout  # one rank prints
    assert losses[-1] < losses[0] - 0.2

"""What a training run leaves behind in its processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.training import REPOSITORY, tiny_values, uneven_corpus, write_config

_REPORT_THREADS = """
import sys
from pathlib import Path
from ringattn.launch.main import main
code = main(sys.argv[1:])
names = []
for task in Path("/proc/self/task").iterdir():
    try:
        names.append((task / "comm").read_text().strip())
    except OSError:
        continue  # it ended meanwhile
print("left:", sorted(name for name in names if "gloo" in name), flush=True)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads thread names from /proc")
def test_a_training_run_ends_without_threads_of_its_groups(tmp_path: Path) -> None:
    script = tmp_path / "report_threads.py"
    script.write_text(_REPORT_THREADS)
    values = tiny_values(uneven_corpus(tmp_path), tmp_path / "run", parallel__cp=2)
    config = write_config(tmp_path / "config.yaml", values)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), "train", str(config), "parallel.engine=fsdp", "train.steps=2"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left: []") == 2, done.stdout

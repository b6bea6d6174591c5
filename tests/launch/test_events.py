"""events.jsonl: whole lines from any process, and no exception whatever the disk says."""

import json
import multiprocessing as mp
from datetime import datetime
from pathlib import Path

import pytest

from ringattn.launch.events import EVENTS_FILE, EventLog
from ringattn.launch.metrics import read_lines


def test_a_line_holds_what_happened(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    assert log.write("skip", 3, "step 3:\n loss is nan")
    assert log.write("straggler", 4, "slow", rank=1, host="node-2")
    first, second = read_lines(tmp_path / EVENTS_FILE)
    assert (first["step"], first["event"], first["rank"]) == (3, "skip", None)
    assert first["message"] == "step 3: loss is nan"
    assert first["host"]
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert (second["rank"], second["host"]) == (1, "node-2")


def _write(folder: str, rank: int) -> None:
    log = EventLog(Path(folder))
    for step in range(200):
        assert log.write("restart", step, "x" * 300, rank=rank)


def test_processes_do_not_mix_lines(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    writers = [context.Process(target=_write, args=(str(tmp_path), rank)) for rank in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    lines = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    for rank in range(2):
        assert [line["step"] for line in lines if line["rank"] == rank] == [*range(200)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_borne(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).symlink_to("/dev/full")
    assert not EventLog(tmp_path).write("skip", 1, "no space")
    assert not EventLog(tmp_path / "missing").write("skip", 1, "no folder")

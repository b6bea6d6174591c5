"""Remembers what a launcher's ranks are at, so that a job that dies costs one cell.

The ranks of a launcher end together, rank 0 with its records among them. A file beside the records
names the cell that is being measured; the next run records it as an error and goes on behind it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ringattn.benchmarks.record import Recorder


def _file(recorder: Recorder) -> Path:
    return recorder.path.with_suffix(".running")


@contextmanager
def marked(
    recorder: Recorder, wanted: bool, name: str, unit: str, cases: Mapping[str, dict[str, Any]]
) -> Iterator[None]:
    """Names cases (case -> config) while the block runs, where `wanted`.

    What the block raises, an interrupt among it, is no death of the process: the file goes.
    """
    if not wanted:
        yield
        return
    path = _file(recorder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": name, "unit": unit, "cases": cases}), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def blame(recorder: Recorder) -> None:
    """Records what the last run died of as errors."""
    path = _file(recorder)
    if not path.exists():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for case, config in found["cases"].items():
        if not recorder.has(found["name"], case):
            reason = "the job ended during this measurement"
            recorder.error(found["name"], case, found["unit"], reason, config)
    path.unlink()

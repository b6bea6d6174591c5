"""What happened to a run besides its steps: ``events.jsonl`` in the run folder."""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

EVENTS_FILE = "events.jsonl"

EventKind = Literal[
    "nonfinite",
    "spike",
    "data error",
    "skip",
    "rollback",
    "stop",
    "straggler",
    "failed save",
    "preemption",
    "restart",
    "failure",
]


class EventLog:
    """Appends JSON lines; opens the file for each, so that any rank or process may write.

    A line holds "step", "time" (UTC, ISO 8601), "event", "rank", "host" and "message". Lines are
    never removed: a run that went on from an older checkpoint shows what led to it.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_FILE

    def write(
        self,
        event: EventKind,
        step: int,
        message: str,
        *,
        rank: int | None = None,
        host: str | None = None,
    ) -> bool:
        """Appends one line; never raises: a full disk must not end a run.

        Args:
            event: what happened.
            step: optimizer steps done when the step in question ended, as in metrics.jsonl.
            message: one line for a person.
            rank: which it happened to; None where it concerns all.
            host: of that rank; None is this one.

        Returns:
            Whether it was written.
        """
        line: dict[str, Any] = {
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "rank": rank,
            "host": socket.gethostname() if host is None else host,
            "message": " ".join(message.split()),
        }
        data = (json.dumps(line) + "\n").encode()
        try:
            # One write of a short line in append mode: lines of several processes do not mix.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                return os.write(file, data) == len(data)
            finally:
                os.close(file)
        except OSError:
            return False

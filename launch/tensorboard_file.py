"""Scalars for TensorBoard, written where and when the caller is: no thread, no queue."""

import itertools
import os
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from ringattn.launch.append_file import AppendFile


class TensorBoardFile:
    """One events file of a run.

    Args:
        folder: made if it is not there.
        step: steps done so far; TensorBoard forgets what earlier files hold of later ones.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here: it takes long, and only one rank needs it.
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._events, self._summaries = cast(Any, event_pb2), cast(Any, summary_pb2)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        names = (folder / f"{stem}.{number}" for number in itertools.count())
        self._file = AppendFile(next(path for path in names if not path.exists()))
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        head = self._record(file_version="brain.Event:2")
        self._file.append(head + self._record(step=step + 1, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends numbers of one step, by tag.

        Raises:
            OSError: they cannot be written now; they are with the next ones.
        """
        kind = self._summaries.Summary
        values = [kind.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._file.append(self._record(step=step, summary=kind(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _record(self, **event: Any) -> bytes:
        """A record of the events format: length, event, and a checksum of each."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        stream = BytesIO()
        data = self._events.Event(wall_time=time.time(), **event).SerializeToString()
        RecordWriter(stream).write(data)
        return stream.getvalue()

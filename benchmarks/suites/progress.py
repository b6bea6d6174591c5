"""Shows how far a benchmark is: one line on a terminal, else a line every `EVERY_S` seconds."""

import sys
import time
from typing import TextIO

from ringattn.launch.progress import format_seconds

EVERY_S = 20.0


class Progress:
    """Called with what is being done; `expect` and `advance` tell how much there is.

    The estimate of what is left is the time per finished measurement so far.

    Args:
        stream: where to write; None is standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._begin = time.monotonic()
        self._total = self._done = 0
        self._last, self._open = -EVERY_S, False

    def expect(self, count: int) -> None:
        """So many more measurements are to come."""
        self._total += count

    def advance(self, count: int = 1) -> None:
        """So many measurements are done."""
        self._done += count

    def __call__(self, text: str) -> None:
        """Shows what is being done."""
        now = time.monotonic()
        if not self._in_place and now - self._last < EVERY_S:
            return
        self._last = now
        done = f"[{self._done}/{self._total}"
        if self._done:
            left = (now - self._begin) / self._done * (self._total - self._done)
            done += f", {format_seconds(left)} left"
        self._write(f"{done}] {text}")

    def note(self, text: str) -> None:
        """Writes a line of its own."""
        self.close()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line that is rewritten in place, if there is one."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False

    def _write(self, text: str) -> None:
        if self._in_place:
            self._stream.write(f"\r\x1b[K{text[:110]}")
            self._open = True
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

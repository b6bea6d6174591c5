"""The line that shows how a run is doing."""

import sys
import time
from collections import Counter
from typing import TextIO

from ringattn.launch.metrics import StepMetrics


class ProgressLine:
    """Writes step, loss, tokens per second and time left on a stream.

    A terminal shows one line that is rewritten in place; anything else gets a line every
    `log_every` steps.

    Args:
        first, last: steps done before and after this process's share of the run.
        log_every: steps between lines where the stream is no terminal.
        stream: where to write; None is standard error.
    """

    def __init__(self, first: int, last: int, log_every: int, stream: TextIO | None = None) -> None:
        self._first, self._last, self._every = first, last, log_every
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._start = time.monotonic()
        self._open = False

    def show(self, metrics: StepMetrics) -> None:
        """Shows one finished step."""
        edge = metrics.step in (self._first + 1, self._last)
        if not (self._in_place or edge or metrics.step % self._every == 0):
            return
        done = metrics.step - self._first
        left = (time.monotonic() - self._start) / done * (self._last - metrics.step)
        degrees = "" if metrics.degrees is None else f"  cp {format_degrees(metrics.degrees)}"
        text = (
            f"step {metrics.step}/{self._last}  loss {metrics.loss:.4f}  "
            f"{metrics.tokens_per_s:,.0f} tokens/s{degrees}  ETA {format_seconds(left)}"
        )
        if self._in_place:
            self._stream.write(f"\r\x1b[K{text}")
            self._open = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """Writes a line of its own."""
        self.close()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line that is rewritten in place, if there is one."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


def format_degrees(degrees: list[int]) -> str:
    """Rounds of each degree, such as 1x8+4x2: one round on 8 ranks per pack, four on 2."""
    counts = Counter(degrees)
    return "+".join(f"{counts[degree]}x{degree}" for degree in sorted(counts, reverse=True))


def format_seconds(seconds: float) -> str:
    """Such as 42s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

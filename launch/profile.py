"""Traces of some training steps."""

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Records the steps of a range into one Chrome trace per rank.

    The trace names plan steps, moves and lanes, which the executor marks with `record_function`.

    Args:
        steps: numbers of the steps to record, counted from 0; empty for none.
        path: file to write when the last of them has ended.
    """

    def __init__(self, steps: range, path: Path) -> None:
        self._steps, self._path = steps, path
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Call before the step number `step`, counted from 0."""
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, step: int) -> None:
        """Call after the step number `step`; writes the trace after the range's last one."""
        if self._profile is not None and step + 1 >= self._steps.stop:
            self._finish()

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None

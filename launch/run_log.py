"""What a run tells about itself while it trains: progress, metrics, evaluations, warnings."""

from pathlib import Path

from ringattn.launch.config import Config
from ringattn.launch.failure import report_line
from ringattn.launch.metrics import EvalMetrics, MetricsWriter, StepMetrics
from ringattn.launch.progress import ProgressLine
from ringattn.launch.write_policy import WritePolicy


class RunLog:
    """Writes and shows what happens, on the one rank that does; elsewhere it does nothing.

    Args:
        config: the run.
        active: whether this rank is the one.

    Attributes:
        policy: what a file that cannot be written means.
    """

    def __init__(self, config: Config, *, active: bool) -> None:
        self._config, self._active = config, active
        self.policy = WritePolicy(config.checkpoint.on_error, self.warn)
        self._writer: MetricsWriter | None = None
        self._progress: ProgressLine | None = None

    def open(self, start: int) -> None:
        """Begins, or begins again, after `start` steps; lines of later steps are removed."""
        self.close()
        if self._active:
            train = self._config.train
            self._writer = MetricsWriter(Path(self._config.run.dir), start, self.policy)
            self._progress = ProgressLine(start, train.steps, train.log_every)

    def close(self) -> None:
        """Closes the files. May be called twice."""
        for part in (self._progress, self._writer):
            if part is not None:
                part.close()
        self._writer = self._progress = None

    def step(self, metrics: StepMetrics) -> None:
        """One optimizer step."""
        if self._writer is not None and self._progress is not None:
            self._writer.write_step(metrics)
            self._progress.show(metrics)

    def evaluation(self, metrics: EvalMetrics) -> None:
        """One evaluation."""
        if self._writer is not None and self._progress is not None:
            self._writer.write_eval(metrics)
            self._progress.note(f"step {metrics.step}  held-out loss {metrics.loss:.4f}")

    def note(self, text: str) -> None:
        """A line below the progress."""
        if self._progress is not None:
            self._progress.note(text)

    def warn(self, text: str) -> None:
        """A line on stderr, also outside of training."""
        if self._active:
            if self._progress is not None:
                self._progress.close()
            report_line(text)

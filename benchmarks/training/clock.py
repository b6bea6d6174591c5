"""What is noted between the steps of a run."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

from ringattn.benchmarks.training.case import RankReport

Part = Callable[[str], AbstractContextManager[object]]
STEP = "step"


class StepClock:
    """Times the steps of one rank, from the end of one to the end of the next.

    A step so holds all that a run does for it, waiting for data included. CPU time is also counted
    while the rank waits for its turn to begin the step: what threads prepare meanwhile is of it.
    On CUDA the peak of allocated bytes of the measured steps is taken too.

    Args:
        steps: of the run. warmup: of them, not measured.
        device: of the rank.
        part: as in `ringattn.benchmarks.memory_trace.MemoryTrace`: each step is a part `STEP`.
        turn: called before each step, returns when the step may begin.
    """

    def __init__(
        self,
        steps: int,
        warmup: int,
        device: torch.device,
        part: Part | None = None,
        turn: Callable[[], None] | None = None,
    ) -> None:
        self._steps, self._warmup, self._device = steps, warmup, device
        self._part: Part = part or (lambda _: nullcontext())
        self._turn = turn or (lambda: None)
        self._open = ExitStack()
        self._wall = self._cpu = 0.0
        self._losses: list[float] = []
        self._wall_s: list[float] = []
        self._cpu_s: list[float] = []

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self._steps

    @property
    def done(self) -> bool:
        """Whether the last step is over."""
        return len(self._losses) >= self._steps

    def begin(self) -> None:
        """The first step begins."""
        self._cpu = time.process_time()
        self._next()

    def tick(self, loss: float) -> None:
        """A step is over on this rank. The caller has waited for the device.

        Args:
            loss: mean over the step's counted tokens of all ranks.
        """
        self._wall_s.append(time.perf_counter() - self._wall)
        cpu = time.process_time()
        self._cpu_s.append(cpu - self._cpu)
        self._cpu = cpu
        self._losses.append(loss)
        self._open.close()
        if not self.done:
            self._next()

    def report(self) -> RankReport:
        """What was noted."""
        on_gpu = self._device.type == "cuda"
        return RankReport(
            losses=self._losses,
            wall_s=self._wall_s,
            cpu_s=self._cpu_s,
            peak_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
        )

    def _next(self) -> None:
        if self._device.type == "cuda" and len(self._losses) == self._warmup:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._turn()
        self._open.enter_context(self._part(STEP))
        self._wall = time.perf_counter()

"""What each rank of a contender does: trains on the clock, then once more to see memory."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ringattn.benchmarks.memory_trace import MemoryTrace
from ringattn.benchmarks.training.case import RankReport, TrainCase
from ringattn.benchmarks.training.clock import STEP, Part, StepClock
from ringattn.benchmarks.training.contenders import Contender
from ringattn.launch.config import Config
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import Session, open_session


def train_rank(
    ranks: Ranks,
    store: dist.Store,
    turn: Callable[[], None],
    contender: Contender,
    case: TrainCase,
    run_dir: str,
) -> RankReport:
    """One rank of a process group of the contender's own.

    Args:
        ranks: this process's place. store: shared by the ranks. turn: see `groups.Body`.
        contender: who trains. case: what.
        run_dir: folder that runs may write to.
    """
    config = contender.config(case)
    with open_session(config, ranks, store) as session:
        return train_in(session, contender, case, run_dir, turn)


def train_in(
    session: Session,
    contender: Contender,
    case: TrainCase,
    run_dir: str,
    turn: Callable[[], None] | None = None,
) -> RankReport:
    """As `train_rank`, where this process is a rank already."""
    config = contender.config(case)
    clock = StepClock(config.train.steps, case.warmup, session.device, turn=turn)
    contender.train(case, _into(config, run_dir, "timed"), session, clock)
    report = clock.report()
    if report.peak_bytes is None and case.traced:
        traced = _into(config, run_dir, "traced")
        peak = _traced_peak(session, contender, case, traced)
        report = replace(report, peak_bytes=peak)
    return report


def _traced_peak(session: Session, contender: Contender, case: TrainCase, config: Config) -> int:
    """Peak bytes of a step, of the tensors that a second run of few steps makes."""
    gc.collect()
    trace = MemoryTrace(torch.device("cpu"))

    def body(part: Part) -> None:
        contender.train(case, config, session, StepClock(case.traced, 0, session.device, part))

    return trace.run(body).peaks[STEP]


def _into(config: Config, run_dir: str, name: str) -> Config:
    return replace(config, run=replace(config.run, dir=str(Path(run_dir) / name)))

"""Starts ranks on this host where no launcher did, by PyTorch's elastic agent."""

import logging
import multiprocessing
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ringattn.launch.control import PREEMPTION_SIGNALS
from ringattn.launch.failure import report_line


def start_local_ranks(
    world: int,
    entry: Callable[..., None],
    *args: Any,
    max_restarts: int = 0,
    preemptible: bool = False,
) -> int:
    """Runs ``entry(*args)`` in `world` new processes of this host and waits for all of them.

    The processes see torchrun's variables. They meet at a port that the operating system picks.
    When one fails the others are stopped; they are also stopped when this process is interrupted
    or dies.

    Args:
        world: number of processes.
        entry: an importable function; it ends its process by `SystemExit` with its exit code.
        args: picklable arguments.
        max_restarts: so many times all processes are started again after one has failed.
        preemptible: SIGTERM and SIGUSR1 are passed on, and the processes end when they are ready.

    Returns:
        0, or the exit code of the rank that failed first; 128 + the number of the signal that
        ended it, or that interrupted this process.
    """
    # Imported here: a process that is itself a rank has no use for the elastic agent.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    ends = [
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
        *([] if preemptible else PREEMPTION_SIGNALS),
    ]
    with (
        tempfile.TemporaryDirectory(prefix="ringattn-ranks-") as logs,
        passing_on(PREEMPTION_SIGNALS if preemptible else ()),
    ):
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle=",".join(number.name for number in ends),
        )
        # The agent's own reports would bury the one line that the failing rank prints.
        logging.disable(logging.CRITICAL)
        try:
            elastic_launch(launch, entry)(*args)
        except ChildFailedError as error:
            rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
            code = int(failure.exitcode)
            if code < 0:
                report_line(f"rank {rank} was ended by signal {failure.signal_name()}")
            return code if code > 0 else 128 - code
        except SignalException as error:
            report_line(f"stopped by {error.sigval.name}")
            return 128 + int(error.sigval)
        finally:
            logging.disable(logging.NOTSET)
    return 0


@contextmanager
def passing_on(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Passes signals on to the processes that this one has started, and lives on itself."""

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

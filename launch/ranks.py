"""A process's place in the job, and starting local ranks where no launcher did."""

import logging
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ringattn.errors import UserError
from ringattn.launch.failure import report_line

LOCAL_LAUNCHER = "ringattn"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        rank, world: place among all processes.
        local_rank, local_world: place among those of this host.
        launcher: who started the process; `LOCAL_LAUNCHER` is a single process of its own.
        node: number that the launcher gives this host; None where it gives none.
        placed: whether the launcher said local_rank and local_world; else they are guesses until
            ranks have compared their hosts.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = LOCAL_LAUNCHER
    node: int | None = None
    placed: bool = True


@dataclass(frozen=True)
class Joined:
    """What a launcher says.

    Attributes:
        ranks: this process's place.
        master: address and port at which the ranks meet, where torchrun's variables do not say.
    """

    ranks: Ranks
    master: tuple[str, int] | None = None


def integer(
    environ: Mapping[str, str],
    key: str,
    *,
    least: int,
    default: int | None = None,
    fix: str = "start with torchrun",
) -> int:
    """The number in a launcher's variable.

    Raises:
        UserError: it is missing and has no default, or is no integer of at least `least`.
    """
    text = environ.get(key)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(key, "is not set, beside other variables of a launcher", fix)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{key}={text}", f"must be an integer of at least {least}", fix)
    return int(text)


def start_local_ranks(world: int, entry: Callable[..., None], *args: Any) -> int:
    """Runs ``entry(*args)`` in `world` new processes of this host and waits for all of them.

    The processes see torchrun's variables. They meet at a port that the operating system picks.
    When one fails the others are stopped; they are also stopped when this process is interrupted
    or dies.

    Args:
        world: number of processes.
        entry: an importable function; it ends its process by `SystemExit` with its exit code.
        args: picklable arguments.

    Returns:
        0, or the exit code of the rank that failed first; 128 + the number of the signal that
        ended it, or that interrupted this process.
    """
    # Imported here: a process that is itself a rank has no use for the elastic agent.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="ringattn-ranks-") as logs:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
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

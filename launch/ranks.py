"""Which rank this process is, and starting local ranks where no launcher did.

A launcher is known by the variables it sets. Adding one is one function in `_LAUNCHERS`.
"""

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
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = LOCAL_LAUNCHER


def discover_ranks(environ: Mapping[str, str]) -> Ranks | None:
    """The place that a launcher's variables give this process; None without a launcher.

    Raises:
        UserError: the variables are incomplete or no numbers.
    """
    for find in _LAUNCHERS:
        if (ranks := find(environ)) is not None:
            return ranks
    return None


def _torchrun(environ: Mapping[str, str]) -> Ranks | None:
    """torchrun and everything that speaks its convention: RANK and WORLD_SIZE."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    world = _integer(environ, "WORLD_SIZE", least=1)
    rank = _integer(environ, "RANK", least=0)
    if rank >= world:
        raise UserError(
            f"RANK={rank}", f"must be below WORLD_SIZE={world}", "unset both, or use torchrun"
        )
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in environ:
            raise UserError(
                f"RANK={rank}", f"needs {key} beside it", "unset RANK, or start with torchrun"
            )
    # Without LOCAL_* every rank is taken to be on this host.
    local_rank = _integer(environ, "LOCAL_RANK", least=0, default=rank)
    local_world = _integer(environ, "LOCAL_WORLD_SIZE", least=1, default=world)
    return Ranks(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        launcher="torchrun",
    )


_LAUNCHERS: tuple[Callable[[Mapping[str, str]], Ranks | None], ...] = (_torchrun,)


def _integer(
    environ: Mapping[str, str], key: str, *, least: int, default: int | None = None
) -> int:
    text = environ.get(key)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{key}={text}", f"must be an integer of at least {least}", "start with torchrun"
        )
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

"""How a failure reaches the person: one line for a mistake, one traceback for a fault.

Every rank of a job often fails at once, with the same error or as a consequence of the first. Only
the first one to claim the report prints it.
"""

import signal
import sys
import traceback
from collections.abc import Callable

import torch.distributed as dist

from ringattn.errors import UserError

EXIT_FAULT, EXIT_USER_ERROR = 1, 2
_CLAIM = "ringattn/failed"


def report_line(text: str) -> None:
    """Prints one line ``ringattn: text`` on stderr, below a progress line if there is one."""
    lead = "\n" if sys.stderr.isatty() else ""
    print(f"{lead}ringattn: {text}", file=sys.stderr, flush=True)


def run_reporting(
    body: Callable[[], None],
    *,
    rank: int | None = None,
    claim: Callable[[], bool] = lambda: True,
) -> int:
    """Runs `body` and turns whatever it raises into a report and an exit code.

    Args:
        body: the work.
        rank: named in reports of faults; None for a process that is no rank.
        claim: whether this process is the one to report; see `claim_report`.

    Returns:
        0; 2 after a `UserError`; 130 after an interrupt; 1 after anything else.
    """
    try:
        body()
    except UserError as error:
        if claim():
            report_line(" ".join(str(error).split()))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if claim():
            report_line("stopped by SIGINT")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return EXIT_FAULT
    except Exception as error:
        if claim():
            traceback.print_exception(error)
            where = "" if rank is None else f"rank {rank}: "
            first = (str(error).splitlines() or [""])[0]
            report_line(f"{where}{type(error).__name__}: {first}")
        return EXIT_FAULT
    return 0


def claim_report(store: dist.Store | None) -> bool:
    """Whether this rank is the first of the job to report a failure. True when nobody can tell."""
    if store is None:
        return True
    try:
        return store.add(_CLAIM, 1) == 1
    except RuntimeError:
        return True

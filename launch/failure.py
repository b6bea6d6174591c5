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

EXIT_FAULT, EXIT_USER_ERROR, EXIT_INTERRUPT = 1, 2, 128 + signal.SIGINT
_FIRST = "ringattn/first failure"


def report_line(text: str) -> None:
    """Prints one line ``ringattn: text`` on stderr, below a progress line if there is one."""
    lead = "\n" if sys.stderr.isatty() else ""
    print(f"{lead}ringattn: {text}", file=sys.stderr, flush=True)


def run_reporting(
    body: Callable[[], None],
    *,
    rank: int | None = None,
    claim: Callable[[int], int | None] = lambda code: None,
) -> int:
    """Runs `body` and turns whatever it raises into a report and an exit code.

    Args:
        body: the work.
        rank: named in reports of faults; None for a process that is no rank.
        claim: asks to report a failure with the given exit code; returns None when this process is
            the one to report, else the exit code to take over; see `claim_failure`.

    Returns:
        0; 2 after a `UserError`; 130 after an interrupt; 1 after anything else; another rank's
        code when that one failed first.
    """
    try:
        body()
    except UserError as error:
        code, report = EXIT_USER_ERROR, lambda e=error: report_line(" ".join(str(e).split()))
    except KeyboardInterrupt:
        code, report = EXIT_INTERRUPT, lambda: report_line("stopped by SIGINT")
    except BrokenPipeError:
        code, report = EXIT_FAULT, lambda: None
    except Exception as error:
        code, report = EXIT_FAULT, lambda e=error: _report_fault(e, rank)
    else:
        return 0
    taken = claim(code)
    if taken is not None:
        return taken
    report()
    return code


def claim_failure(store: dist.Store | None, rank: int, code: int) -> int | None:
    """Asks to be the rank that reports the job's failure; see `run_reporting`.

    Args:
        store: shared by the job's ranks; None or unreachable lets every rank report.
        rank: of this process.
        code: exit code of its failure.

    Returns:
        None when this rank is the first; else the exit code of the rank that was.
    """
    if store is None:
        return None
    mine = f"{rank} {code}"
    try:
        first = store.compare_set(_FIRST, "", mine).decode()
    except RuntimeError:
        return None
    return None if first == mine else int(first.split()[1])


def _report_fault(error: Exception, rank: int | None) -> None:
    traceback.print_exception(error)
    where = [] if rank is None else [f"rank {rank}"]
    where += getattr(error, "__notes__", [])
    first = (str(error).splitlines() or [""])[0]
    report_line(": ".join([*where, type(error).__name__, first]))

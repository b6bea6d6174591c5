"""How a failure reaches the person: one line for a mistake, one report for a fault.

Every rank of a job often fails at once, with the same error or as a consequence of the first. Only
one reports; see `ringattn.launch.monitor`.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from ringattn.errors import UserError

# A launcher stops all processes once one has ended: those that say nothing let the others speak.
REPORT_GRACE_S = 10.0
EXIT_FAULT, EXIT_USER_ERROR, EXIT_INTERRUPT = 1, 2, 128 + signal.SIGINT


class AlreadyToldError(Exception):
    """Something is wrong, and the person knows: the process ends with 1 and says no more."""


class ToldElsewhereError(Exception):
    """A mistake of the user that another process of the job tells: this one ends with 2."""


@dataclass(frozen=True)
class Failure:
    """Why a process ends.

    Attributes:
        code: its exit code.
        line: what happened, in one line; "" for nothing to say.
        trace: traceback of the fault, where there is one.
        quiet: the line says it all: a mistake of the user, or an interrupt.
    """

    code: int
    line: str
    trace: str = ""
    quiet: bool = False


def report_line(text: str) -> None:
    """Prints one line ``ringattn: text`` on stderr, below a progress line if there is one."""
    report_text(f"ringattn: {text}\n")


def report_text(text: str) -> None:
    """Prints on stderr at once, below a progress line if there is one."""
    lead = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{lead}{text}")
    sys.stderr.flush()


def run_reporting(body: Callable[[], None], report: Callable[[Failure], int] | None = None) -> int:
    """Runs `body` and turns whatever it raises into a report and an exit code.

    Args:
        body: the work.
        report: tells the person of a failure, and returns the process's exit code; None prints it.

    Returns:
        0; 2 after a `UserError`; 130 after an interrupt; 1 after anything else.
    """
    try:
        body()
    except UserError as error:
        failure = Failure(EXIT_USER_ERROR, " ".join(str(error).split()), quiet=True)
    except KeyboardInterrupt:
        failure = Failure(EXIT_INTERRUPT, "stopped by SIGINT", quiet=True)
    except ToldElsewhereError:
        time.sleep(REPORT_GRACE_S)
        failure = Failure(EXIT_USER_ERROR, "", quiet=True)
    except (AlreadyToldError, BrokenPipeError):
        failure = Failure(EXIT_FAULT, "", quiet=True)
    except Exception as error:
        failure = describe_fault(error)
    else:
        return 0
    return (report or print_failure)(failure)


def describe_fault(error: Exception) -> Failure:
    """A fault with its traceback."""
    first = (str(error).splitlines() or [""])[0]
    return Failure(
        EXIT_FAULT, f"{type(error).__name__}: {first}", "".join(traceback.format_exception(error))
    )


def print_failure(failure: Failure) -> int:
    """Prints a failure of a process that is alone; returns its exit code."""
    if failure.line:
        report_text(f"{failure.trace}ringattn: {failure.line}\n")
    return failure.code


def end_process(code: int) -> NoReturn:
    """Ends this process at once: threads that wait for other ranks would hold it up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Processes of a GPU session: run to an end of their own or to a hard one, output in a log."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

GRACE = 2.0  # seconds between asking a process to end and ending it
TIMED_OUT = "timed out"


def run_to_end(command: Sequence[str], seconds: float, log: Path) -> int | str:
    """Runs a command; its exit status, or `TIMED_OUT` where it was ended with all it had started.

    Output is appended to the log. Kernels are compiled, not interpreted.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    with log.open("a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"\nended after {seconds:.0f} s", file=file, flush=True)
            return TIMED_OUT
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of the process's group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def ended(status: int | str) -> str:
    """Why a step with such an end failed, or ''."""
    if isinstance(status, str):
        return status
    return f"exit status {status}" if status else ""

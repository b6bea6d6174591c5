"""Whose a run folder is: what a restarted job takes up again, and what another job must not share.

``RUN/job`` holds three lines: the launcher's name for the job, a token of the life of the ranks
that write there now, and the process that does.
"""

import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from ringattn.errors import UserError
from ringattn.launch.checkpoint_choice import list_checkpoints
from ringattn.launch.config import Config

JOB_FILE = "job"


def restart_count(environ: Mapping[str, str]) -> int:
    """How often the elastic agent has started this job's ranks again."""
    text = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def job_name(environ: Mapping[str, str]) -> str:
    """A name that all ranks of a job share, also after restarts; "" without an elastic agent."""
    return environ.get("TORCHELASTIC_RUN_ID", "")


def resume_after_restart(config: Config, environ: Mapping[str, str]) -> Config:
    """After a restart a run goes on from its own newest checkpoint, wherever it was told to begin.

    It does so once the job has saved one there; before that it begins again where it was told to.
    """
    own = Path(config.run.dir) / JOB_FILE
    if restart_count(environ) == 0 or not own.is_file():
        return config
    if own.read_text(encoding="utf-8").partition("\n")[0] != job_name(environ):
        return config
    if not list_checkpoints(config.run.dir):
        return config
    return replace(config, checkpoint=replace(config.checkpoint, resume="auto"))


class FolderClaim:
    """A run folder that is this job's, while its process lives. For the one rank that writes.

    The file is locked, where the file system can, so that a second job is refused at its start. The
    token in it covers the others: the later job has the folder, the earlier one notices.

    Args:
        run_dir: the folder, which exists.
        environ: variables of this process.
        wait_s: how long to wait for a job that is ending.

    Raises:
        UserError: another job trains there.
    """

    def __init__(self, run_dir: Path, environ: Mapping[str, str], wait_s: float = 0.0) -> None:
        self._path, self._token = run_dir / JOB_FILE, secrets.token_hex(8)
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            _lock(self._file, wait_s)
        except BlockingIOError:
            self._file.seek(0)
            lines = self._file.read().splitlines()
            self._file.close()
            who = lines[2] if len(lines) == 3 else "unknown"
            raise UserError(
                f"run.dir={run_dir}",
                f"another job trains there ({who})",
                "wait for its end or stop it, or name another run.dir",
            ) from None
        who = f"pid {os.getpid()} on host {socket.gethostname()}"
        self._file.truncate(0)
        self._file.write(f"{job_name(environ)}\n{self._token}\n{who}\n")
        self._file.flush()

    def check(self) -> None:
        """Looks whether the folder is still this job's, before something is written that matters.

        Raises:
            UserError: another job has taken it over.
        """
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return  # whoever writes the checkpoint says what is wrong with the folder
        if len(lines) == 3 and lines[1] != self._token:
            raise UserError(
                f"run.dir={self._path.parent}",
                f"another job has begun to write there ({lines[2]})",
                "let one job at a time train in a run folder; this one ends",
            )

    def release(self) -> None:
        """Lets others have the folder. May be called twice."""
        self._file.close()


def _lock(file: TextIO, wait_s: float) -> None:
    """Locks a file until it is closed.

    Raises:
        BlockingIOError: another process has it.
    """
    if sys.platform == "win32":
        return
    import fcntl  # absent on Windows

    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        except OSError:
            return  # a file system without locks

"""``ringattn doctor``: whether a cluster is right, and what it can do.

Runs as one rank of the launcher that started it, or starts local ranks.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import torch

from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.config_load import config_from_values
from ringattn.launch.doctor_board import GRACE_S, Board
from ringattn.launch.doctor_report import findings, table
from ringattn.launch.doctor_steps import Examination, Request
from ringattn.launch.failure import AlreadyToldError, ToldElsewhereError
from ringattn.launch.launchers import discover_ranks_once
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import Session
from ringattn.launch.train import on_ranks, run_rank


def doctor(request: Request) -> int:
    """Examines the ranks of the launcher that started this process, or local ones.

    Returns:
        0 when all is right, 1 when something is wrong, 2 for a mistake of the user.

    Raises:
        UserError: a request that cannot be met.
    """
    found = discover_ranks_once(os.environ, request.launcher)
    try:
        config, body = _config(request, found), partial(examine, request)
    except UserError:
        if found is not None and found.rank:
            raise ToldElsewhereError from None
        raise
    if found is not None:
        return run_rank(config, found, body)
    return on_ranks(config, body, partial(_check, request), "none")


def _config(request: Request, found: Ranks | None) -> Config:
    """A configuration for ranks that share one sequence; `found` if a launcher started them."""
    if request.ranks is not None and request.ranks < 1:
        raise UserError(f"--ranks {request.ranks}", "must be at least 1", "pass e.g. 2")
    if not 1 <= request.timeout <= 3600:
        raise UserError(f"--timeout {request.timeout:g}", "must be 1 to 3600 s", "pass e.g. 60")
    if found is not None and request.ranks not in (None, found.world):
        raise UserError(
            f"--ranks {request.ranks}",
            f"{found.launcher} has started {found.world} ranks",
            "leave --ranks out",
        )
    world = found.world if found is not None else request.ranks or _default_ranks(request.device)
    return config_from_values(
        {
            "run.dir": tempfile.gettempdir(),
            "run.device": request.device,
            # The rank's monitor is the last resort: a step tells more about who is silent.
            "run.timeout_s": 2 * request.timeout + 3 * GRACE_S,
            "parallel.cp": world,
            "data.seq_len": max(8192, world),
        }
    )


def _default_ranks(device: str) -> int:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and device != "cpu" else 0
    return gpus or 2


def _check(request: Request) -> None:
    """Files must be writable before ranks measure for a minute."""
    for flag, name in (("--json", request.json_file), ("--out", request.out)):
        folder = Path(name).absolute().parent if name else None
        if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(f"{flag} {name}", f"{folder} is no writable folder", "name another")
        if name and Path(name).is_dir():
            raise UserError(f"{flag} {name}", "is a folder", "name a file")


def examine(request: Request, config: Config, session: Session) -> None:
    """One rank's part of the examination; rank 0 prints and writes.

    Raises:
        AlreadyToldError: something is wrong.
        CommunicationError: rank 0 did not answer.
    """
    del config
    if session.is_main:
        _check(request)
    board = Board.open(session.ranks.rank, session.ranks.world, request.timeout)
    examination = Examination(request, session, board)
    report = examination.run()
    if session.is_main:
        examination.write()
        print("\n".join([*table(report), *findings(report)]), flush=True)
    # A launcher stops every rank once one has ended: the report comes first.
    board.leave()
    if report.wrong:
        raise AlreadyToldError

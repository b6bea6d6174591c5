"""``ringattn train``: from a configuration to running ranks."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.config_check import check_config
from ringattn.launch.control import StopRequest, heeding_signals
from ringattn.launch.elastic import describe_fit, fit_to_world
from ringattn.launch.failure import (
    REPORT_GRACE_S,
    Failure,
    end_process,
    print_failure,
    report_line,
    run_reporting,
)
from ringattn.launch.idle_settings import idle_settings
from ringattn.launch.job import open_job, prepare_corpus
from ringattn.launch.launchers import Launcher, discover_ranks, discover_ranks_once
from ringattn.launch.local_ranks import start_local_ranks
from ringattn.launch.monitor import Monitor
from ringattn.launch.ranks import Ranks
from ringattn.launch.rendezvous import launcher_holds_store
from ringattn.launch.restart import resume_after_restart
from ringattn.launch.session import Session, open_session, open_store
from ringattn.launch.trainer import Trainer
from ringattn.launch.whereabouts import Whereabouts

Body = Callable[[Config, Session], None]


def train(config: Config, launcher: Launcher = "auto", *, max_restarts: int = 0) -> int:
    """Trains under the launcher that started this process, or on local ranks of its own.

    Everything that can be checked without ranks is checked before any is started.

    Args:
        config: the run.
        launcher: as in `discover_ranks`.
        max_restarts: without a launcher, ranks are started again so often after a failure.

    Returns:
        The exit code: 0, also after a preemption; 2 for a mistake of the user, else of the rank
        that failed first.
    """
    return on_ranks(
        config,
        _train_rank,
        partial(check_before_start, config),
        launcher,
        max_restarts=max_restarts,
        preemptible=True,
    )


def on_ranks(
    config: Config,
    body: Body,
    check: Callable[[], None],
    launcher: Launcher = "auto",
    *,
    max_restarts: int = 0,
    preemptible: bool = False,
) -> int:
    """Runs `body` as one rank of the launcher that started this process, or on local ranks.

    Args:
        config: dp × cp ranks, device, timeout.
        body: what a rank does; picklable.
        check: called once before local ranks are started; raises UserError.
        launcher: as in `discover_ranks`.
        max_restarts: local ranks are started again so often after a failure.
        preemptible: `body` looks at ``Session.request`` and ends in order when it is set.

    Returns:
        The exit code: 0, 2 for a mistake of the user, else of the rank that failed first.
    """
    ranks = discover_ranks_once(os.environ, launcher)
    if ranks is not None and max_restarts:
        refuse = partial(_refuse_restarts, ranks, max_restarts)
        return run_reporting(refuse, partial(_report_alone, ranks=ranks))
    if ranks is not None:
        return run_rank(config, ranks, body, preemptible)
    code = run_reporting(check)
    if code:
        return code
    if config.world == 1 and not max_restarts:
        return run_rank(config, Ranks(), body, preemptible)
    return start_local_ranks(
        config.world,
        local_rank,
        config,
        body,
        preemptible,
        max_restarts=max_restarts,
        preemptible=preemptible,
    )


def _train_rank(config: Config, session: Session) -> None:
    if session.is_main:
        for line in idle_settings(config):
            report_line(line)
        prepare_corpus(config)
    session.barrier()
    Trainer(open_job(config, session.sharers), session).fit()


def check_before_start(config: Config) -> None:
    """Prepares the corpus if it is missing, and checks everything; starts no rank.

    Raises:
        UserError: naming key, value, rule and fix.
    """
    check_config(config)
    prepare_corpus(config)
    open_job(config, local_world=config.world)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.run.device == "auto" and 0 < gpus < config.world:
        print(
            f"{gpus} GPU(s) for {config.world} ranks: ranks share them and communicate through "
            f"the host, which is slow (dp × cp = {gpus} ranks would have one each)",
            file=sys.stderr,
            flush=True,
        )


def local_rank(config: Config, body: Body, preemptible: bool) -> None:
    """The body of a process that `start_local_ranks` started; ends it with its exit code."""
    ranks = discover_ranks(os.environ)
    assert ranks is not None, "the elastic agent sets torchrun's variables"
    # Ctrl-C reaches every process of the terminal; the parent reports it and ends the ranks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run_rank(config, ranks, body, preemptible)


def run_rank(config: Config, ranks: Ranks, work: Body, preemptible: bool = False) -> int:
    """Works as one rank; reports a failure at most once per job. See `on_ranks`."""
    timeout = timedelta(seconds=config.run.timeout_s)
    monitors: list[Monitor] = []

    def report(failure: Failure) -> int:
        # A launcher also sends SIGTERM to the ranks that are left when one has failed: they must
        # live until the report is out.
        request.heard = True
        return monitors[0].report(failure) if monitors else _report_alone(failure, ranks)

    def body() -> None:
        check_config(config)
        fitted = fit_to_world(config, ranks.world)
        if ranks.rank == 0 and (note := describe_fit(config, fitted)):
            print(note, file=sys.stderr, flush=True)
        fitted = resume_after_restart(fitted, os.environ)
        store, where = open_store(ranks, timeout), Whereabouts()
        keeper = None if launcher_holds_store(os.environ) else 0
        monitors.append(
            Monitor(ranks, store, config.run.timeout_s, where, Path(config.run.dir), keeper)
        )
        with monitors[0], open_session(fitted, ranks, store, where, request) as session:
            work(fitted, session)

    with heeding_signals() if preemptible else nullcontext(StopRequest()) as request:
        code = run_reporting(body, report)
    if code and ranks.world > 1:
        end_process(code)
    return code


def _refuse_restarts(ranks: Ranks, wanted: int) -> None:
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    raise UserError(
        f"--max-restarts {wanted}",
        f"restarts ranks that this command starts itself, and {ranks.launcher} started these",
        "give --max-restarts to torchrun, before the program" if elastic
        else "leave it out: the same command, started again, goes on from the newest checkpoint",
    )  # fmt: skip


def _report_alone(failure: Failure, ranks: Ranks) -> int:
    """Reports what went wrong before ranks could talk.

    All of them make the same checks, so that a mistake is told by the first one alone. The others
    stay a moment, because a launcher stops every rank once one has ended.
    """
    if failure.quiet and ranks.rank:
        time.sleep(REPORT_GRACE_S)
        return failure.code
    return print_failure(failure)

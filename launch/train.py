"""``ringattn train``: from a configuration to running ranks."""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from ringattn.launch.config import Config
from ringattn.launch.config_check import check_config, check_world
from ringattn.launch.failure import claim_failure, run_reporting
from ringattn.launch.job import open_job, prepare_corpus
from ringattn.launch.launchers import Launcher, discover_ranks
from ringattn.launch.ranks import Ranks, start_local_ranks
from ringattn.launch.session import Session, open_session, open_store
from ringattn.launch.trainer import Trainer

_REPORT_GRACE_S = 10.0


def train(config: Config, launcher: Launcher = "auto") -> int:
    """Trains under the launcher that started this process, or on local ranks of its own.

    Everything that can be checked without ranks is checked before any is started.

    Returns:
        The exit code: 0, 2 for a mistake of the user, else of the rank that failed first.
    """
    return on_ranks(config, _train_rank, partial(check_before_start, config), launcher)


def on_ranks(
    config: Config,
    body: Callable[[Config, Session], None],
    check: Callable[[], None],
    launcher: Launcher = "auto",
) -> int:
    """Runs `body` as one rank of the launcher that started this process, or on local ranks.

    Args:
        config: dp × cp ranks, device, timeout.
        body: what a rank does; picklable.
        check: called once before local ranks are started; raises UserError.
        launcher: as in `discover_ranks`.

    Returns:
        The exit code: 0, 2 for a mistake of the user, else of the rank that failed first.
    """
    ranks = discover_ranks(os.environ, launcher)
    if ranks is not None:
        return _run_rank(config, ranks, body)
    code = run_reporting(check)
    if code:
        return code
    if config.world == 1:
        return _run_rank(config, Ranks(), body)
    return start_local_ranks(config.world, local_rank, config, body)


def _train_rank(config: Config, session: Session) -> None:
    if session.is_main:
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


def local_rank(config: Config, body: Callable[[Config, Session], None]) -> None:
    """The body of a process that `start_local_ranks` started; ends it with its exit code."""
    ranks = discover_ranks(os.environ)
    assert ranks is not None, "the elastic agent sets torchrun's variables"
    # Ctrl-C reaches every process of the terminal; the parent reports it and ends the ranks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _leave(_run_rank(config, ranks, body))


def _run_rank(config: Config, ranks: Ranks, work: Callable[[Config, Session], None]) -> int:
    """Works as one rank; reports a failure at most once per job."""
    timeout = timedelta(seconds=config.run.timeout_s)
    stores: list[dist.Store] = []

    def claim(code: int) -> int | None:
        if not stores:
            # Until ranks can talk, all of them make the same checks: the first one reports. The
            # others stay a moment, because a launcher stops every rank once one has ended.
            if ranks.rank == 0:
                return None
            time.sleep(_REPORT_GRACE_S)
            return code
        return claim_failure(stores[0], ranks.rank, code)

    def body() -> None:
        check_config(config)
        check_world(config, ranks.world)
        stores.append(open_store(ranks, timeout))
        with open_session(config, ranks, stores[0]) as session:
            work(config, session)

    return run_reporting(body, rank=ranks.rank if ranks.world > 1 else None, claim=claim)


def _leave(code: int) -> None:
    """Ends a rank at once after a failure: threads that wait for peers would hold it up."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)

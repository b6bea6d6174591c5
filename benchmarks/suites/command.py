"""``ringattn bench``: runs suites under the launcher that started this process, or alone.

Alone it starts ranks of its own for each number of ranks. Under a launcher rank 0 leads and writes
the records, and the others answer it.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ringattn.benchmarks.record import Recorder, Tally, keep_figures
from ringattn.benchmarks.suites import (
    kernels_suite,
    marker,
    masks_suite,
    measured_scaling,
    methods_suite,
)
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.ranks import AskedRanks, LaunchedRanks, LocalRanks, RanksError
from ringattn.benchmarks.suites.settings import Settings, checked, load_settings, used_sections
from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.config_load import config_from_values
from ringattn.launch.failure import AlreadyToldError
from ringattn.launch.launchers import Launcher, discover_ranks_once
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import Session
from ringattn.launch.train import run_rank

SHOWN = 3
"""Reasons of refusals that are printed, the most common ones."""
SUITES = ("kernels", "methods", "masks", "train", "scaling")
_OF_RANKS: Mapping[str, Callable[[Settings, Recorder, Progress, AskedRanks], None]] = {
    "kernels": kernels_suite.run,
    "methods": methods_suite.run,
    "masks": masks_suite.run,
    "scaling": measured_scaling.run,
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for. None leaves it to the settings.

    Attributes:
        suite: one of `SUITES`, or "all". settings: a shipped name or a file.
        out: folder of the records. launcher: as in `discover_ranks`.
        ranks, masks, methods: in place of the settings'. peers: whether they run beside.
        simulate: scaling is predicted for clusters. overrides: section.key=value.
        retry: what was refused or ended in an error is measured again.
    """

    suite: str
    settings: str
    out: str
    launcher: Launcher = "auto"
    ranks: tuple[int, ...] | None = None
    masks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    peers: bool | None = None
    simulate: bool = False
    retry: bool = False
    overrides: tuple[str, ...] = ()


def bench(request: Request) -> int:
    """Runs the suites that are asked for.

    Returns:
        0, also where cells are refused; 1 where a cell ended in an error or ranks were lost; 2
        for a mistake of the user.

    Raises:
        UserError: a request or settings that cannot be met.
    """
    settings = resolved(request)
    found = discover_ranks_once(os.environ, request.launcher)
    _check_out(request.out)
    if found is None:
        return _alone(request, settings)
    if request.ranks is not None and request.ranks != (found.world,):
        raise UserError(
            f"--ranks {' '.join(map(str, request.ranks))}",
            f"{found.launcher} has started {found.world} ranks",
            "leave --ranks out, or run without a launcher",
        )
    return run_rank(_config(settings, found), found, partial(_as_rank, request, settings))


def resolved(request: Request) -> Settings:
    """The settings with everything that the request changes. Raises UserError."""
    settings = load_settings(request.settings, request.overrides)
    _check_used(request)
    changes = {
        "ranks": request.ranks, "masks": request.masks, "peers": request.peers
    }  # fmt: skip
    common = replace(settings.common, **{k: v for k, v in changes.items() if v is not None})
    settings = replace(settings, common=common, simulate=request.simulate)
    if request.ranks is not None:
        settings = replace(settings, train=replace(settings.train, ranks=request.ranks))
    if request.masks is not None:
        settings = replace(
            settings,
            kernels=replace(settings.kernels, masks=request.masks),
            scaling=replace(settings.scaling, masks=request.masks),
            simulated=replace(settings.simulated, masks=request.masks),
        )
    if request.methods is not None:
        settings = replace(
            settings,
            methods=replace(settings.methods, methods=request.methods),
            scaling=replace(settings.scaling, methods=request.methods),
            simulated=replace(settings.simulated, methods=request.methods),
        )
    return checked(settings)


def _check_used(request: Request) -> None:
    """Refuses what would have no effect."""
    if request.suite == "all":
        return
    if request.simulate and request.suite != "scaling":
        raise UserError(
            f"--simulate with {request.suite}", "only scaling can be simulated", "leave it out"
        )
    used = used_sections(request.suite, simulate=request.simulate)
    for text in request.overrides:
        section = text.partition(".")[0]
        if section not in used:
            what = f"bench {request.suite}" + " --simulate" * request.simulate
            raise UserError(text, f"has no effect on {what}", f"set keys of {' and '.join(used)}")


def _check_out(out: str) -> None:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise UserError(f"--out {out}", "is no writable folder", "name another")


def _suites(request: Request) -> tuple[str, ...]:
    return SUITES if request.suite == "all" else (request.suite,)


def _alone(request: Request, settings: Settings) -> int:
    common, show = settings.common, Progress()
    with ExitStack() as stack:
        ranks = LocalRanks(stack, common.device, common.threads, common.timeout_s)
        return _run(request, settings, ranks, show)


def _as_rank(request: Request, settings: Settings, config: Config, session: Session) -> None:
    """One rank of a launcher's job."""
    del config
    ranks = LaunchedRanks(session, settings.common.timeout_s)
    if not session.is_main:
        ranks.serve()
        return
    code = _run(request, settings, ranks, Progress())
    ranks.end()
    if code:
        raise AlreadyToldError


def _run(request: Request, settings: Settings, ranks: AskedRanks, show: Progress) -> int:
    """Runs the suites one after the other; prints where the records are, and how many."""
    tallies = []
    try:
        for suite in _suites(request):
            path = Path(request.out) / f"{suite}.jsonl"
            if request.retry:
                keep_figures(path)
            recorder = Recorder(path)
            before = len(recorder)
            marker.blame(recorder)
            _suite(suite, settings, recorder, show, ranks)
            show.close()
            tally = Tally.of(path)
            tallies.append(tally)
            print(f"{suite}: {tally} in {path} ({len(recorder) - before:,} new)", flush=True)
            for reason, count in tally.reasons[:SHOWN]:
                print(f"  refused {count:,}: {reason}", flush=True)
    except RanksError as error:
        show.close()
        print(f"ranks were lost ({error}); run the command again to go on", file=sys.stderr)
        return 1
    return 1 if any(tally.errors for tally in tallies) else 0


def _suite(
    suite: str, settings: Settings, recorder: Recorder, show: Progress, ranks: AskedRanks
) -> None:
    if suite in _OF_RANKS and not (suite == "scaling" and settings.simulate):
        _OF_RANKS[suite](settings, recorder, show, ranks)
    elif ranks.worlds is not None and not settings.simulate:
        reason = f"{suite} starts ranks of its own: run it without a launcher"
        show.note(reason)
        recorder.refused(f"bench.{suite}", f"under-a-launcher-{ranks.worlds[0]}", "1", reason)
    else:
        # Imported when asked for: training and the simulator take their time.
        module = importlib.import_module(f"ringattn.benchmarks.suites.{suite}_suite")
        module.run(settings, recorder, show)


def _config(settings: Settings, found: Ranks) -> Config:
    """A configuration for ranks that share one sequence."""
    timeout = settings.common.timeout_s
    return config_from_values(
        {
            "run.dir": tempfile.gettempdir(),
            "run.device": settings.common.device,
            # The rank's monitor is the last resort: a request's own timeout comes first.
            "run.timeout_s": 2 * timeout + 60,
            "parallel.cp": found.world,
            "data.seq_len": max(8192, found.world),
        }
    )

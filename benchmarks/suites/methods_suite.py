"""``ringattn bench methods``: every method on every mask, peers beside."""

from functools import partial

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.suites.attention_suite import Row, entrants_of, run_rows, worlds_of
from ringattn.benchmarks.suites.cells import problems
from ringattn.benchmarks.suites.mask_cases import expanded
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.ranks import AskedRanks
from ringattn.benchmarks.suites.settings import Settings, method_names


def run(settings: Settings, recorder: Recorder, show: Progress, ranks: AskedRanks) -> None:
    """Masks × lengths × packs × ranks × methods; see `rounds` for what is recorded of each."""
    common = settings.common
    found = problems(common, settings.methods.seq_len, expanded(common.masks))
    worlds = worlds_of(common, ranks)
    entrants = partial(entrants_of, common, method_names(settings.methods.methods))
    rows = [Row(problem, worlds) for problem in found]
    run_rows("methods", settings, recorder, show, ranks, rows, entrants)

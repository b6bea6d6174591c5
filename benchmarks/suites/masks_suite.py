"""``ringattn bench masks``: what each mask costs with method "auto", peers beside."""

from functools import partial

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.suites.attention_suite import Row, entrants_of, run_rows, worlds_of
from ringattn.benchmarks.suites.cells import problems
from ringattn.benchmarks.suites.mask_cases import expanded
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.ranks import AskedRanks
from ringattn.benchmarks.suites.settings import Settings


def run(settings: Settings, recorder: Recorder, show: Progress, ranks: AskedRanks) -> None:
    """Masks × lengths × packs × ranks. One rank is the one process that the others share out."""
    common = settings.common
    found = problems(common, settings.masks.seq_len, expanded(common.masks))
    worlds = worlds_of(common, ranks)
    rows = [Row(problem, worlds) for problem in found]
    entrants = partial(entrants_of, common, ("auto",))
    run_rows("masks", settings, recorder, show, ranks, rows, entrants)

"""``ringattn bench scaling``: weak and strong scaling, measured on the ranks at hand."""

from functools import partial

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.suites.attention_suite import Row, entrants_of, run_rows, worlds_of
from ringattn.benchmarks.suites.cells import problems
from ringattn.benchmarks.suites.mask_cases import expanded
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.ranks import AskedRanks
from ringattn.benchmarks.suites.settings import Settings, method_names


def run(settings: Settings, recorder: Recorder, show: Progress, ranks: AskedRanks) -> None:
    """Weak: a number of tokens per rank. Strong: a number of tokens in all."""
    common, scaling = settings.common, settings.scaling
    masks, worlds = expanded(scaling.masks), worlds_of(common, ranks)
    rows = [
        Row(problem, (world,), {"scaling": "weak"})
        for tokens in scaling.weak
        for world in worlds
        for problem in problems(common, (tokens * world,), masks)
    ]
    rows += [
        Row(problem, worlds, {"scaling": "strong"})
        for problem in problems(common, scaling.strong, masks)
    ]
    entrants = partial(entrants_of, common, method_names(scaling.methods))
    run_rows("scaling", settings, recorder, show, ranks, rows, entrants)

"""What the suites of sharded attention share: which units there are, and going through them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ringattn.benchmarks import peers
from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.suites.cells import Entrant, Problem
from ringattn.benchmarks.suites.judge import Judge
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.ranks import AskedRanks, RanksError
from ringattn.benchmarks.suites.rounds import Unit
from ringattn.benchmarks.suites.settings import Common, Settings

NESTED = ("double_ring", "usp", "loongtrain", "hybrid")  # plans that look at nodes


@dataclass(frozen=True)
class Row:
    """A problem, the numbers of ranks that it is measured at, and more for its records."""

    problem: Problem
    worlds: tuple[int, ...]
    extra: Mapping[str, str] = field(default_factory=dict)


def worlds_of(common: Common, ranks: AskedRanks) -> tuple[int, ...]:
    """Numbers of ranks to measure at: a launcher's, or those of the settings."""
    return ranks.worlds or tuple(sorted(set(common.ranks)))


def entrants_of(common: Common, methods: Iterable[str], world: int) -> list[Entrant]:
    """Ours by method, then the peers."""
    halves = world // 2 if world >= 4 and world % 2 == 0 else None
    ours = [
        Entrant(
            method=method,
            layout=common.layout,
            cluster=common.cluster,
            ranks_per_node=common.ranks_per_node or (halves if method in NESTED else None),
        )
        for method in methods
    ]
    if not common.peers:
        return ours
    rivals = peers.contenders() if world > 1 else (peers.YARDSTICK,)
    return ours + [Entrant(contender=peer.name) for peer in rivals]


def run_rows(
    suite: str,
    settings: Settings,
    recorder: Recorder,
    show: Progress,
    ranks: AskedRanks,
    rows: Iterable[Row],
    entrants: Callable[[int], list[Entrant]],
) -> None:
    """Measures what has no record yet, problem by problem; the reference is made once for each.

    Raises RanksError when the ranks are lost; what is known is then recorded.
    """
    todo: list[tuple[Problem, list[Unit]]] = []
    for row in rows:
        units = [
            Unit(suite, settings, ranks, recorder, row.problem, w, entrants(w), row.extra)
            for w in row.worlds
        ]
        missing = [unit for unit in units if unit.entrants]
        if missing:
            todo.append((row.problem, missing))
            show.expect(sum(len(unit.entrants) for unit in missing))
    for problem, units in todo:
        show(f"{problem.mask}: reference")
        try:
            judge = Judge(problem, ranks.device, settings.common.reference)
        except (RuntimeError, MemoryError) as error:
            reason = f"inputs and reference: {type(error).__name__}: {error}"
            for unit in units:
                unit.give_up(reason)
                show.advance(len(unit.entrants))
            continue
        for unit in units:
            try:
                unit.measure(judge, show)
            except RanksError as error:
                show.note(f"{problem.mask} on {unit.world} ranks: {error}")
                raise
            show.advance(len(unit.entrants))

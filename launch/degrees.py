"""Which packs of a step run on how many ranks: a schedule of rounds, as plain data.

A round has one degree c: its packs run side by side, each on c consecutive ranks, so that all
ranks take part in every round. The schedule follows from predicted seconds alone, and every rank
computes the same one without communication.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

LEAST_GAIN = 0.02  # of the plain schedule's time; predictions are not sharper than that


@dataclass(frozen=True, kw_only=True)
class Round:
    """Packs that run side by side.

    Attributes:
        degree: ranks that share each pack.
        packs: numbers of the packs; ranks g * degree ... of the world share packs[g].
        seconds: until the slowest pack is done, predicted.
    """

    degree: int
    packs: tuple[int, ...]
    seconds: float

    def pack_of(self, rank: int) -> int:
        """The pack that a rank of the world takes part in."""
        return self.packs[rank // self.degree]


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The rounds of a step, in order.

    Attributes:
        rounds: every pack of the step lies in one of them.
        plain_seconds: what rounds of the highest degree alone would take, in the packs' order.
    """

    rounds: tuple[Round, ...]
    plain_seconds: float

    @property
    def seconds(self) -> float:
        """Predicted for the step."""
        return sum(r.seconds for r in self.rounds)

    @property
    def gain(self) -> float:
        """Share of the plain schedule's time that is saved; 0 for the plain schedule itself."""
        return 1 - self.seconds / self.plain_seconds if self.plain_seconds else 0.0


def degrees_of(cp: int, min_cp: int | None) -> list[int]:
    """Degrees that may be used, highest first: multiples of `min_cp` that divide `cp`."""
    if min_cp is None:
        return [cp]
    return [c for c in range(cp, min_cp - 1, -1) if cp % c == 0 and c % min_cp == 0]


def schedule_step(
    seconds: Mapping[int, Sequence[float]], world: int, least_gain: float = LEAST_GAIN
) -> StepSchedule:
    """The rounds of least total predicted time; plain rounds unless that saves `least_gain`.

    Packs of one round take similar times in a good schedule, because a round lasts as long as its
    slowest pack. So packs are sorted by time, and a dynamic programme cuts the order into rounds.
    Where all degrees sort the packs alike no other assignment is faster: in any schedule the
    round of the slowest pack may swap its others for the slowest that are left. Where they do not,
    the order of each degree is tried.

    Args:
        seconds: of each pack at each degree, degrees highest first; the number of packs is a
            multiple of world / highest degree.
        world: ranks, a multiple of every degree.
        least_gain: share of the plain time.
    """
    highest = max(seconds)
    count = len(seconds[highest])
    plain = tuple(_round(packs, highest, seconds) for packs in _plain(count, highest, world))
    before = sum(r.seconds for r in plain)
    best = StepSchedule(rounds=plain, plain_seconds=before)
    found = best
    for times in seconds.values():
        order = sorted(range(count), key=lambda pack: (-times[pack], pack))
        rounds = _cut(order, seconds, world)
        other = StepSchedule(rounds=rounds, plain_seconds=before)
        if other.seconds < found.seconds:
            found = other
    return found if found.gain >= least_gain else best


def judge_step(
    schedule: StepSchedule, seconds: Callable[[int, int], float], highest: int, world: int
) -> StepSchedule:
    """The same rounds with other seconds, asked only where they are needed.

    Args:
        schedule: of a step.
        seconds: of a pack at a degree.
        highest: degree of the plain rounds. world: ranks.
    """

    def slowest(packs: Sequence[int], degree: int) -> float:
        return max(seconds(pack, degree) for pack in packs)

    count = sum(len(entry.packs) for entry in schedule.rounds)
    return StepSchedule(
        rounds=tuple(replace(r, seconds=slowest(r.packs, r.degree)) for r in schedule.rounds),
        plain_seconds=sum(slowest(packs, highest) for packs in _plain(count, highest, world)),
    )


def _plain(count: int, highest: int, world: int) -> list[range]:
    """Packs of each round of the highest degree, in order."""
    side = world // highest
    return [range(first, first + side) for first in range(0, count, side)]


def _cut(
    order: Sequence[int], seconds: Mapping[int, Sequence[float]], world: int
) -> tuple[Round, ...]:
    """The best rounds of packs that follow each other in `order`."""
    best: list[tuple[float, tuple[Round, ...]] | None] = [(0.0, ())]
    for stop in range(1, len(order) + 1):
        found = None
        for degree in seconds:
            start = stop - world // degree
            before = best[start] if start >= 0 else None
            if before is None:
                continue
            last = _round(order[start:stop], degree, seconds)
            if found is None or before[0] + last.seconds < found[0]:
                found = before[0] + last.seconds, (*before[1], last)
        best.append(found)
    whole = best[-1]
    assert whole is not None, "the packs fill rounds of the highest degree"
    return whole[1]


def _round(packs: Sequence[int], degree: int, seconds: Mapping[int, Sequence[float]]) -> Round:
    slowest = max(seconds[degree][pack] for pack in packs)
    return Round(degree=degree, packs=tuple(packs), seconds=slowest)

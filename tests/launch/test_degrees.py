"""Schedules of packs over degrees: against brute force, and what every schedule must keep to."""

from itertools import combinations, permutations

import numpy as np
import pytest

from ringattn.launch.degrees import StepSchedule, degrees_of, schedule_step

Seconds = dict[int, list[float]]


def drawn(rng: np.random.Generator, degrees: list[int], count: int, alike: bool) -> Seconds:
    """Seconds of packs; `alike`: all degrees sort them alike."""
    work = np.sort(rng.lognormal(0, 1, count))
    found = {}
    for degree in degrees:
        overhead = rng.uniform(0, 0.5, count if not alike else 1) * degree**0.5
        found[degree] = (work / degree + overhead).tolist()
    order = rng.permutation(count)
    return {degree: [times[i] for i in order] for degree, times in found.items()}


def brute_force(seconds: Seconds, world: int) -> float:
    """The least total over all ways to split the packs into rounds."""

    def least(left: frozenset[int]) -> float:
        if not left:
            return 0.0
        best = float("inf")
        first = min(left)
        for degree, times in seconds.items():
            for others in combinations(sorted(left - {first}), world // degree - 1):
                packs = {first, *others}
                best = min(best, max(times[p] for p in packs) + least(left - packs))
        return best

    return least(frozenset(range(len(next(iter(seconds.values()))))))


def check(schedule: StepSchedule, seconds: Seconds, world: int) -> None:
    packs = [pack for entry in schedule.rounds for pack in entry.packs]
    assert sorted(packs) == list(range(len(seconds[max(seconds)])))
    for entry in schedule.rounds:
        assert entry.seconds == max(seconds[entry.degree][pack] for pack in entry.packs)
        sharing = [entry.pack_of(rank) for rank in range(world)]
        assert sharing == [p for p in entry.packs for _ in range(entry.degree)]


@pytest.mark.parametrize(
    "world, degrees, count", [(4, [4, 2, 1], 6), (4, [2, 1], 6), (6, [6, 3], 6)]
)
@pytest.mark.parametrize("seed", range(4))
def test_least_total_where_degrees_sort_alike(
    world: int, degrees: list[int], count: int, seed: int
) -> None:
    seconds = drawn(np.random.default_rng(seed), degrees, count, alike=True)
    schedule = schedule_step(seconds, world, least_gain=0.0)
    check(schedule, seconds, world)
    assert schedule.seconds == pytest.approx(brute_force(seconds, world), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_near_the_least_where_they_do_not(seed: int) -> None:
    seconds = drawn(np.random.default_rng(seed), [4, 2, 1], 6, alike=False)
    schedule = schedule_step(seconds, 4, least_gain=0.0)
    check(schedule, seconds, 4)
    least = brute_force(seconds, 4)
    assert least <= schedule.seconds * (1 + 1e-12)
    assert schedule.seconds <= 1.25 * least


def test_the_order_of_packs_does_not_matter() -> None:
    seconds = drawn(np.random.default_rng(1), [4, 1], 4, alike=True)
    totals = {
        round(schedule_step({c: [t[i] for i in p] for c, t in seconds.items()}, 4, 0.0).seconds, 12)
        for p in permutations(range(4))
    }
    assert len(totals) == 1


def test_long_packs_keep_all_ranks_and_short_ones_do_not() -> None:
    long, short = {4: 10.0, 1: 60.0}, {4: 2.0, 1: 3.0}
    packs = [short, long, short, short, short]
    seconds = {degree: [pack[degree] for pack in packs] for degree in (4, 1)}
    schedule = schedule_step(seconds, 4)
    assert sorted(r.degree for r in schedule.rounds) == [1, 4]
    assert schedule.seconds == 13.0
    assert schedule.plain_seconds == 18.0
    assert schedule.gain == pytest.approx(5 / 18)


def test_a_small_gain_is_no_reason() -> None:
    seconds = {2: [1.0, 1.0], 1: [1.97, 1.97]}
    plain = schedule_step(seconds, 2)
    assert [(r.degree, r.packs) for r in plain.rounds] == [(2, (0,)), (2, (1,))]
    assert plain.gain == 0
    assert [r.degree for r in schedule_step(seconds, 2, least_gain=0.01).rounds] == [1]


def test_candidate_degrees() -> None:
    assert degrees_of(8, None) == [8]
    assert degrees_of(8, 1) == [8, 4, 2, 1]
    assert degrees_of(12, 2) == [12, 6, 4, 2]
    assert degrees_of(8, 8) == [8]

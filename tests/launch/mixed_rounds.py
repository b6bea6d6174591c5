"""Rounds of every degree in a step, whatever the prices say."""

import itertools
from typing import Any
from unittest import mock

from ringattn.launch import degree_feed
from ringattn.launch.degrees import Round, StepSchedule

Seconds = dict[int, list[float]]


def mixed(seconds: Seconds, world: int, first: int = 0) -> StepSchedule:
    """Degrees in turn from the `first`, highest one, and the packs in a rotated order."""
    packs_of_step = len(next(iter(seconds.values())))
    left, rounds = [*range(1, packs_of_step), 0], []
    degrees = sorted(seconds, reverse=True)
    while left:
        degree = degrees[(first + len(rounds)) % len(degrees)]
        if len(left) < world // degree:
            degree = degrees[0]
        packs, left = left[: world // degree], left[world // degree :]
        rounds.append(Round(degree=degree, packs=tuple(packs), seconds=1.0))
    return StepSchedule(rounds=tuple(rounds), plain_seconds=100.0)


def use_mixed_rounds() -> Any:
    """Every step has the same rounds."""
    return mock.patch.object(degree_feed, "schedule_step", mixed)


def use_changing_rounds() -> Any:
    """Steps differ in their rounds and in how many they are; every third has one degree."""
    steps = itertools.count()

    def schedule(seconds: Seconds, world: int) -> StepSchedule:
        step = next(steps)
        highest = max(seconds)
        kept = {highest: seconds[highest]} if step % 3 == 2 else seconds
        return mixed(kept, world, step)

    return mock.patch.object(degree_feed, "schedule_step", schedule)

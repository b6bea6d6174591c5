"""Estimated prices of packs: the schedules they lead to, judged by the prices of plans."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.launch.degree_prices import SAMPLES, PackPrices, fit_terms, pack_terms
from ringattn.launch.degrees import degrees_of, judge_step, schedule_step
from ringattn.launch.feed import layer_masks
from ringattn.launch.packing import PackedDataset

TOKENS, WORLD = 16384, 4


class _Corpus:
    """Packs of given document lengths, in place of a `PackedDataset`."""

    def __init__(self, packs: list[list[int]]) -> None:
        self.packs, self.tokens = packs, TOKENS * len(packs)

    def lengths(self, start: int, seq_len: int) -> list[int]:
        assert (start % TOKENS, seq_len) == (0, TOKENS)
        return self.packs[start // TOKENS % len(self.packs)]


def drawn_packs(rng: np.random.Generator, kind: str, count: int) -> list[list[int]]:
    """Packs of short documents, of lengths of every scale, or of one document among short ones."""
    packs: list[list[int]] = []
    for index in range(count):
        if kind == "one_long" and index % 4 == 0:
            packs.append([TOKENS])
            continue
        lengths: list[int] = []
        while (left := TOKENS - sum(lengths)) > 0:
            scale = rng.uniform(4, 9.7) if kind == "log_uniform" else rng.normal(6.2, 1)
            lengths.append(min(left, max(1, int(np.exp(scale)))))
        packs.append(lengths)
    return packs


def contexts(world: int, **arguments: Any) -> dict[int, ra.ContextParallel]:
    shape = {"heads": (16, 4), "head_dim": 128, "dtype": torch.bfloat16, "cluster": "h100_sxm"}
    return {c: ra.ContextParallel(c, **shape, **arguments) for c in degrees_of(world, 1)}


def prices_of(
    packs: list[list[int]], found: dict[int, ra.ContextParallel], windows: Sequence[int | None]
) -> PackPrices:
    return PackPrices(cast(PackedDataset, _Corpus(packs)), found, windows)


@pytest.mark.parametrize("kind", ["short", "log_uniform", "one_long"])
def test_schedules_by_estimates_are_near_those_by_plans(kind: str, seed: int) -> None:
    packs = drawn_packs(np.random.default_rng(seed), kind, 20)
    prices = prices_of(packs, contexts(WORLD, method="direct", layout="zigzag"), [None])
    estimated = prices.estimated(packs[:8], TOKENS)
    planned = {
        degree: [prices.planned(lengths, degree) for lengths in packs[:8]] for degree in estimated
    }
    best = schedule_step(planned, WORLD)
    chosen = schedule_step(estimated, WORLD)
    judged = judge_step(chosen, lambda pack, degree: planned[degree][pack], WORLD, WORLD)
    assert judged.seconds <= 1.05 * best.seconds
    assert judged.plain_seconds == pytest.approx(best.plain_seconds)
    # One price for all degrees' work would leave all of the gain there is.
    assert best.gain > 0.05
    assert judged.gain >= 0.6 * best.gain


def test_samples_are_planned_once_and_packs_are_not(seed: int) -> None:
    packs = drawn_packs(np.random.default_rng(seed), "log_uniform", 30)
    found = contexts(2, method="ring", layout="zigzag")
    prices = prices_of(packs, found, [None, 300])
    planned: list[Any] = []
    for context in found.values():
        make = context.plans
        context.plans = lambda masks, make=make: (planned.append(masks), make(masks))[1]
    first = prices.estimated(packs, TOKENS)
    assert len(planned) == SAMPLES * len(found)
    assert prices.estimated(packs[3:5], TOKENS) == {c: t[3:5] for c, t in first.items()}
    assert len(planned) == SAMPLES * len(found)
    again = prices_of(packs, contexts(2, method="ring", layout="zigzag"), [None, 300])
    assert again.estimated(packs, TOKENS) == first


def test_terms_of_a_pack_by_hand() -> None:
    """Areas are those of the masks; rows reach to their document's, window's or shard's size."""
    lengths, windows = [3, 7, 6], [None, 4, 4]
    area = sum(mask.area for mask in layer_masks(lengths, windows))
    one, area_part, reach = pack_terms(lengths, windows, 2).tolist()
    assert one == 1.0
    assert area_part == pytest.approx(2 * area / (3 * 16 * 16))
    assert reach == pytest.approx((9 + 49 + 36 + 2 * (9 + 28 + 24)) / (3 * 16 * 8))


def test_fits_are_exact_where_they_can_be_and_never_fall_with_work(seed: int) -> None:
    rng = np.random.default_rng(seed)
    terms = np.column_stack([np.ones(12), rng.uniform(0, 1, (12, 2))])
    weights = np.array([0.5, 2.0, 1.0])
    np.testing.assert_allclose(fit_terms(terms, terms @ weights), weights, rtol=1e-9)
    falling = fit_terms(terms, 3 - 2 * terms[:, 1])
    assert (falling >= 0).all()
    assert falling[1] == 0
    np.testing.assert_allclose(fit_terms(terms[:1], np.array([4.0])) @ terms[0], 4.0)

"""Packs of a step on different numbers of ranks: same losses, same areas, whatever the schedule."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from ringattn.errors import UserError
from ringattn.launch import degree_feed
from ringattn.launch.config_check import check_config
from ringattn.launch.config_load import config_from_values
from ringattn.launch.degree_feed import simulated_degrees
from ringattn.launch.degrees import Round, StepSchedule
from ringattn.launch.feed import layer_masks
from ringattn.launch.job import open_job
from tests.launch.mixed_rounds import use_mixed_rounds
from tests.launch.training import assert_parity, tiny_values, train_pooled, uneven_corpus

PACKS = 8
# Prices need a cluster; nothing is left to choose by them, which is quicker.
CLUSTER = {
    "attention.cluster": "cpu_gloo", "attention.method": "ring", "attention.layout": "zigzag"
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def values(corpus: Path, run_dir: Path, **overrides: Any) -> dict[str, Any]:
    shape = {"train__steps": 3, "model__window": 30}
    return tiny_values(corpus, run_dir, **(shape | overrides)) | CLUSTER


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Eight packs per step on one rank."""
    run = tmp_path_factory.mktemp("plain") / "run"
    return train_pooled(values(corpus, run, train__accumulate=PACKS))


def _wrong_group() -> Any:
    """Mixed rounds in which every group runs the first group's pack."""
    stack = contextlib.ExitStack()
    stack.enter_context(use_mixed_rounds())
    stack.enter_context(mock.patch.object(Round, "pack_of", lambda self, rank: self.packs[0]))
    return stack


@pytest.mark.parametrize("cp, dp", [(4, 1), (2, 2)])
def test_losses_do_not_depend_on_degrees(
    cp: int, dp: int, corpus: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    mesh = {"parallel__cp": cp, "parallel__dp": dp, "parallel__min_cp": 1}
    got = train_pooled(
        values(corpus, tmp_path / "run", train__accumulate=PACKS // dp, **mesh), use_mixed_rounds
    )
    assert_parity(plain, got)
    used = [4, 2, 1, 4] if cp == 4 else [2, 1, 2]
    assert [line["degrees"] for line in got] == [used] * 3
    assert all(line["degrees"] is None for line in plain)


def test_a_round_run_by_the_wrong_group_is_seen(
    corpus: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    mesh = {"parallel__cp": 2, "parallel__min_cp": 1, "train__steps": 1}
    got = train_pooled(
        values(corpus, tmp_path / "run", train__accumulate=PACKS, **mesh), _wrong_group
    )
    with pytest.raises(AssertionError):
        assert_parity(plain[:1], got)


def test_prices_and_plans_of_a_step(corpus: Path, tmp_path: Path) -> None:
    """Every rank deals itself the pack of its group, with a plan for the round's degree."""
    config = config_from_values(
        values(corpus, tmp_path / "run", parallel__cp=4, parallel__min_cp=1, train__accumulate=5)
        | {"model.full_every": 2}
    )
    check_config(config)
    job = open_job(config, 4)
    degrees = simulated_degrees(config, job.shape, job.train)
    length = config.data.seq_len
    starts = length * np.arange(5).reshape(5, 1, 1)
    priced = degrees.price(starts, length)
    assert list(degrees.contexts) == [4, 2, 1]
    for (start,), lengths in zip(priced.packs, priced.lengths, strict=True):
        assert lengths == job.train.read(start, length).lengths
        masks = layer_masks(lengths, job.shape.windows)
        for degree, context in degrees.contexts.items():
            first, second = context.plans(masks)
            assert (first.world, second.world) == (degree, degree)
            assert first.mask.area < second.mask.area
            assert first.layout is second.layout
            alone = (first.seconds or 0) + (second.seconds or 0)
            assert degrees.prices.planned(lengths, degree) == alone > 0
    judged = degrees.judge(priced)
    assert [r.packs for r in judged.rounds] == [r.packs for r in priced.schedule.rounds]
    with mock.patch.object(degree_feed, "schedule_step", _mixed_of_five):
        for rank in range(4):
            dealt = replace(degrees, rank=rank).deal(starts, length)
            assert [start for (start,), _ in dealt] == [4 * length, rank * length]
            assert [plans[0].world for _, plans in dealt] == [4, 1]


def _mixed_of_five(seconds: dict[int, list[float]], world: int) -> StepSchedule:
    del seconds, world
    rounds = (
        Round(degree=4, packs=(4,), seconds=1.0), Round(degree=1, packs=(0, 1, 2, 3), seconds=1.0)
    )  # fmt: skip
    return StepSchedule(rounds=rounds, plain_seconds=5.0)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (
            {"parallel__cp": 4, "parallel__min_cp": 3},
            "parallel.min_cp=3: must divide parallel.cp=4",
        ),
        ({"parallel__min_cp": 2}, "parallel.min_cp=2: must divide parallel.cp=1"),
        ({"parallel__cp": 4, "parallel__min_cp": 0}, "parallel.min_cp=0: must be at least 1"),
        (
            {"parallel__cp": 4, "parallel__min_cp": 2, "attention__cluster": None},
            "attention.cluster",
        ),
    ],
)
def test_refusals(overrides: dict[str, Any], says: str, tmp_path: Path) -> None:
    config = config_from_values(
        tiny_values(tmp_path, tmp_path / "run", attention__cluster="h100_sxm")
        | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    with pytest.raises(UserError, match=says):
        check_config(config)


def test_settings_must_fit_every_degree(corpus: Path, tmp_path: Path) -> None:
    """But for a rank alone, for which methods have no meaning."""
    found = values(corpus, tmp_path / "run", parallel__cp=4, parallel__min_cp=1)
    found |= {"attention.method": "usp", "attention.u": 2}
    open_job(config_from_values(found), 4)
    with pytest.raises(UserError, match=r"attention on 2 ranks \(parallel.min_cp\)"):
        open_job(config_from_values(found | {"attention.u": 4}), 4)

"""Which rank is slow: the detector on made-up figures, and one rank of a run that is."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ringattn.launch import straggler, trainer
from ringattn.launch.config import FaultsConfig
from ringattn.launch.events import EVENTS_FILE
from ringattn.launch.feed import PlanAttend, take_share
from ringattn.launch.metrics import read_lines
from ringattn.launch.straggler import OwnWork, Stragglers, TimedAttend, slowest
from tests.launch.engines import ENGINES
from tests.launch.training import tiny_values, train_pooled, uneven_corpus


def test_a_rank_is_named_once_and_again_after_it_recovered() -> None:
    found = Stragglers(FaultsConfig(straggler_factor=1.5, straggler_steps=3))
    fast, slow = [1.0, 1.0, 1.0, 1.1], [1.0, 1.0, 1.6, 1.1]
    named = [
        [s.rank for s in found.update(figures)]
        for figures in (slow, slow, fast, slow, slow, slow, slow, fast, slow, slow, slow)
    ]
    assert named == [[], [], [], [], [], [2], [], [], [], [], [2]]


def test_each_slow_rank_is_counted_by_itself() -> None:
    found = Stragglers(FaultsConfig(straggler_factor=2.0, straggler_steps=2))
    assert found.update([1, 1, 1, 3, 1]) == []
    (one,) = found.update([3, 1, 1, 3, 1])
    assert (one.rank, one.seconds, one.median, one.steps) == (3, 3, 1, 2)
    assert "rank 3 on node-7" in one.line("node-7")
    (other,) = found.update([3, 1, 1, 1, 1])
    assert other.rank == 0


@pytest.mark.parametrize(
    "seconds, ratio", [([1.0, 4.0], (1, 4.0)), ([2.0, 1.0, 1.0], (0, 2.0)), ([5.0], (None, None))]
)
def test_ratio_to_the_lower_median(seconds: list[float], ratio: tuple[Any, Any]) -> None:
    assert slowest(seconds) == ratio


def test_none_is_named_without_work_or_when_not_asked() -> None:
    assert slowest([0.0, 0.0, 1.0]) == (None, None)
    assert Stragglers(FaultsConfig(straggler_steps=1)).update([0.0, 0.0, 1.0]) == []
    assert Stragglers(FaultsConfig(straggler_steps=1)).update([1.0]) == []
    assert Stragglers(FaultsConfig(straggler_steps=1, straggler_factor=0)).update([1, 9]) == []


def test_only_work_of_the_forward_counts() -> None:
    """A clock that moves by one second whenever it is looked at."""
    work = OwnWork(torch.device("cpu"))
    seconds = [float(second) for second in range(100)]
    x = torch.zeros(1)
    with (
        mock.patch.object(straggler.time, "perf_counter", side_effect=seconds),
        mock.patch.object(PlanAttend, "__call__", return_value=x),
    ):
        attend = TimedAttend(mock.Mock(), work)
        with work.forward():
            work.pause()
            work.pause()
            work.resume()
            work.resume()
            attend(x, x, x)
        assert work.take() == 3.0  # before the pause, up to attention, after it
        attend(x, x, x)  # as a backward pass does that computes it again
        work.resume()
        work.pause()
        assert work.take() == 0.0


class SlowRank(contextlib.ExitStack):
    """The last rank does some hundred times the work of a micro-batch before its forward."""

    def __init__(self) -> None:
        super().__init__()

        def slow(micro: Any, device: torch.device) -> Any:
            if dist.get_rank() == dist.get_world_size() - 1:
                sum(range(6_000_000))
            return take_share(micro, device)

        self.enter_context(mock.patch.object(trainer, "take_share", slow))


class WaitsCounted(SlowRank):
    """As `SlowRank`, but what other ranks are waited for is taken for own work."""

    def __init__(self) -> None:
        super().__init__()
        self.enter_context(mock.patch.object(TimedAttend, "__call__", PlanAttend.__call__))
        for engine in ("engine_replicated.ReplicatedEngine", "engine_fsdp.FsdpEngine"):
            target = f"ringattn.launch.{engine}.around_waits"
            self.enter_context(mock.patch(target))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def named_in_a_run(
    corpus: Path, run_dir: Path, engine: str, patch: type[SlowRank]
) -> tuple[list[int], list[int]]:
    """The slowest rank of each step but the first, and the ranks that events name."""
    values = tiny_values(corpus, run_dir, parallel__cp=2, train__steps=5, faults__straggler_steps=3)
    lines = train_pooled(values | ENGINES[engine], patch)
    events = [e for e in read_lines(run_dir / EVENTS_FILE) if e["event"] == "straggler"]
    assert all(line["slowest_ratio"] >= 1 for line in lines)
    return [line["slowest_rank"] for line in lines[1:]], [event["rank"] for event in events]


@pytest.mark.parametrize("engine", ["ddp", "fsdp", pytest.param("zero 3", marks=pytest.mark.full)])
def test_the_slow_rank_is_the_one_named(engine: str, corpus: Path, tmp_path: Path) -> None:
    assert named_in_a_run(corpus, tmp_path / "run", engine, SlowRank) == ([1] * 4, [1])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_waits_taken_for_work_hide_it(engine: str, corpus: Path, tmp_path: Path) -> None:
    assert named_in_a_run(corpus, tmp_path / "run", engine, WaitsCounted)[1] == []


def test_one_rank_is_not_compared(corpus: Path, tmp_path: Path) -> None:
    (line,) = train_pooled(tiny_values(corpus, tmp_path / "run", train__steps=1))
    assert line["slowest_rank"] is None
    assert line["slowest_ratio"] is None

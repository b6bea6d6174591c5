"""The end-to-end comparison at a tiny size: losses coincide; who is wrong or dies is an error."""

import io
import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import ringattn as ra
from ringattn.benchmarks.record import Recorder, read_records
from ringattn.benchmarks.suites import train_suite
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.settings import Settings, load_settings
from ringattn.benchmarks.suites.train_settings import TrainSettings
from ringattn.benchmarks.training.case import RankReport, TrainCase
from ringattn.benchmarks.training.clock import StepClock
from ringattn.benchmarks.training.contenders import CONTENDERS, Contender, contenders
from ringattn.benchmarks.training.figures import loss_difference, step_figures, step_flops
from ringattn.benchmarks.training.peak import PeakRate
from ringattn.benchmarks.training.plain_model import causal_sdpa
from ringattn.benchmarks.training.plain_torch import PlainTorch
from ringattn.benchmarks.training.rank import train_in
from ringattn.benchmarks.training.ulysses import Ulysses
from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.flops import matmul_parameters
from ringattn.launch.job import open_split
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import Session
from tests.launch.training import tiny_values, uneven_corpus
from tests.ranks import run_ranks

STEPS = 3
PLAIN = "pytorch, one process"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def tiny_case(corpus: Path, **changes: Any) -> TrainCase:
    values = tiny_values(corpus, Path("unused"), train__steps=STEPS, train__warmup_steps=1)
    return TrainCase(values=values, ranks=2, packs=2, threads=2, **changes)


def _train(
    rank: int, world: int, _group: Any, contender: Contender, case: TrainCase, folder: str
) -> RankReport:
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world)
    session = Session(ranks=ranks, device=torch.device("cpu"), timeout=timedelta(seconds=300))
    return train_in(session, contender, case, folder)


def train(contender: Contender, case: TrainCase, folder: Path) -> list[RankReport]:
    return run_ranks(contender.world(case), _train, contender, case, str(folder))


def test_contenders_train_alike(corpus: Path, tmp_path: Path) -> None:
    case = tiny_case(corpus)
    (plain,) = train(CONTENDERS[PLAIN], case, tmp_path / PLAIN)
    assert len(plain.losses) == len(plain.wall_s) == len(plain.cpu_s) == STEPS
    assert plain.losses[-1] < plain.losses[0]
    for name in (
        "pytorch, fsdp2",
        "deepspeed_ulysses",
        "ringattn",
        "ringattn, fsdp + full checkpointing",
    ):
        for report in train(CONTENDERS[name], case, tmp_path / name):
            assert loss_difference(report.losses, plain.losses) < 1e-5, name


def test_memory_is_that_of_a_step(corpus: Path, tmp_path: Path) -> None:
    """Weights, gradients and two moments are there at least, and a second run is looked at."""
    case = tiny_case(corpus, traced=1)
    (plain,) = train(CONTENDERS[PLAIN], case, tmp_path)
    config = CONTENDERS[PLAIN].config(case)
    assert plain.peak_bytes is not None
    assert plain.peak_bytes > 4 * 4 * matmul_parameters(case.shape(config))
    longer = replace(case, values={**case.values, "data.seq_len": 1600})
    (other,) = train(CONTENDERS[PLAIN], longer, tmp_path / "longer")
    assert other.peak_bytes is not None
    assert other.peak_bytes > 2 * plain.peak_bytes


def causal_over_everything(lengths: list[int]) -> Any:
    """Forgets that the sequence has documents."""
    del lengths
    return causal_sdpa


@dataclass(frozen=True, kw_only=True)
class Dying(PlainTorch):
    """Ends its process in the second step."""

    def train(self, case: TrainCase, config: Config, session: Session, clock: StepClock) -> None:
        clock.begin()
        clock.tick(1.0)
        os._exit(7)


def tiny_settings(corpus: Path, **changes: Any) -> TrainSettings:
    values = tiny_values(corpus, Path("unused"), train__warmup_steps=1)
    shown = tuple(f"{key}={value}" for key, value in values.items())
    settings = TrainSettings(
        values=shown, seq_len=(160,), ranks=(2,), warm_up=1, steps=2, traced=0, timeout_s=100.0
    )
    return replace(settings, **changes)


def test_wrong_and_dying_contenders_are_errors(corpus: Path, tmp_path: Path) -> None:
    rivals = [
        CONTENDERS[PLAIN],
        Dying(name="dying", sharded=False),
        PlainTorch(name="wrong", sharded=False, attention=causal_over_everything),
    ]
    out, shown = tmp_path / "train.jsonl", io.StringIO()
    settings = tiny_settings(corpus)
    train_suite.measure(settings, rivals, Recorder(out), Progress(shown), "the command")
    records = {record.config["contender"]: record for record in read_records(out)}
    plain, dying, wrong = (records[one.name] for one in rivals)
    assert plain.status == "ok"
    assert wrong.status == dying.status == "error"
    assert wrong.reason.startswith(f"wrong losses: they differ from those of {PLAIN} by")
    assert len(wrong.config["losses"]) == 3
    assert dying.reason == "rank 0 died, exit code 7"
    assert plain.unit == "tokens/s"
    assert plain.value == plain.figures["tokens_per_second"]
    assert plain.config["command"] == "the command"
    assert "error: rank 0 died" in shown.getvalue()
    again = io.StringIO()
    train_suite.measure(settings, rivals, Recorder(out), Progress(again), "the command")
    assert not again.getvalue()


@pytest.mark.full
def test_whole_suite(corpus: Path, tmp_path: Path) -> None:
    """Every contender in processes of its own, one after the other; all agree, or are refused."""
    out = tmp_path / "train.jsonl"
    settings = tiny_settings(corpus, traced=1, interleaved=False)
    train_suite.run(Settings(train=settings), Recorder(out), Progress(io.StringIO()))
    records = read_records(out)
    assert [record.config["contender"] for record in records] == list(CONTENDERS)
    assert {record.status for record in records} == {"ok"}
    for record in records:
        difference, peak = record.figures["loss_difference"], record.figures["peak_bytes"]
        assert difference is not None
        assert difference < 1e-5
        assert peak


def test_figures_are_of_the_slowest_rank_and_all_cpus(corpus: Path) -> None:
    case = tiny_case(corpus, warmup=1)
    reports = [
        RankReport(losses=[5.0, 4.0, 3.0], wall_s=[9, 1, 4], cpu_s=[9, 1, 1], peak_bytes=10),
        RankReport(losses=[5.0, 4.0, 3.0], wall_s=[9, 2, 2], cpu_s=[9, 1, 3], peak_bytes=30),
    ]
    found = step_figures(case, reports, [600, 1200], PeakRate(1000.0, "a sheet", 500.0)).figures
    tokens = 2 * 160
    assert found["seconds"] == 3
    assert found["cpu_seconds"] == 3
    assert found["tokens_per_second"] == pytest.approx(tokens / 3)
    assert found["mfu"] == pytest.approx(0.3)
    assert found["mfu_cpu"] == pytest.approx(0.6)
    assert found["peak_bytes"] == 30
    assert found["loss"] == 3.0


def test_operations_follow_the_exact_masks(corpus: Path) -> None:
    case = tiny_case(corpus, warmup=1)
    config = CONTENDERS["ringattn"].config(case)
    shape, dataset = case.shape(config), open_split(config, "train")
    packs = [dataset.pack(index).lengths for index in range(2, 4)]  # of the second step
    pairs = sum(int(ra.masks.documents(p, causal=True).dense().sum()) for p in packs)
    attention = 14 * pairs * shape.layers * shape.heads * shape.head_dim
    products = 6 * matmul_parameters(shape) * 2 * 160
    assert step_flops(case, config)[0] == attention + products


def test_losses_that_are_no_numbers_differ() -> None:
    assert loss_difference([2.0, 1.0], [2.0, 1.25]) == pytest.approx(0.2)
    assert loss_difference([2.0, math.nan], [2.0, 1.0]) == math.inf
    assert loss_difference([2.0], [2.0, 1.0]) == math.inf


def test_refusals_say_why(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case(corpus)
    ulysses = Ulysses(name="deepspeed_ulysses")
    shape = case.shape(ulysses.config(case))
    assert ulysses.refusal(case, shape) is None
    three = replace(case, ranks=3)
    assert ulysses.refusal(three, shape) == "160 tokens do not divide among 3 ranks"
    odd = replace(shape, heads=3, kv_heads=3)
    assert ulysses.refusal(case, odd) == "3 query heads do not divide among 2 ranks"
    windowed = replace(shape, window=8)
    assert "window" in str(CONTENDERS[PLAIN].refusal(case, windowed))
    sharded = CONTENDERS["pytorch, fsdp2"]
    assert "do not divide" in str(sharded.refusal(replace(case, packs=3), shape))
    monkeypatch.setattr("ringattn.parallel.zero.find_spec", lambda _: None)
    assert "not installed" in str(ulysses.refusal(case, shape))


def test_shipped_settings_can_be_read() -> None:
    for name, lengths in (("train", 1), ("train_gpu", 5), ("smoke", 1)):
        settings = load_settings(name, ["train.ranks=[2]"]).train
        assert len(settings.cases()) == lengths
        assert contenders(settings.contenders)


def test_unknown_contenders_are_refused() -> None:
    with pytest.raises(UserError, match="is no contender"):
        contenders(["megatron"])

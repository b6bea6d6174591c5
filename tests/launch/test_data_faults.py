"""Records that cannot be read while a run trains: all ranks leave the step out together."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints
from ringattn.launch.corpus import DataError
from ringattn.launch.events import EVENTS_FILE
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.packing import Pack, PackedDataset
from ringattn.launch.trainer import Trainer
from ringattn.parallel.lines import gather_lines
from tests.launch import training
from tests.launch.checkpoints import stored_tensors
from tests.launch.test_guard import comparable
from tests.launch.training import tiny_values, train_pooled, uneven_corpus
from tests.ranks import run_ranks

BAD_STEP = 3  # from 1


class OneRankCannotRead(contextlib.ExitStack):
    """The last rank's disk fails it in one step."""

    def __init__(self) -> None:
        super().__init__()
        real = PackedDataset.read

        def read(self: PackedDataset, start: int, seq_len: int) -> Pack:
            last = dist.get_rank() == dist.get_world_size() - 1
            if last and self.split == "train" and start == (BAD_STEP - 1) * seq_len:
                raise DataError("train-00000.bin: document 3, token 17", "is gone", "put it back")
            return real(self, start, seq_len)

        self.enter_context(mock.patch.object(PackedDataset, "read", read))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def values_of(corpus: Path, run_dir: Path, **overrides: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "parallel__cp": 2,
        "train__steps": 5,
        "checkpoint__every": 1,
        "checkpoint__keep": 0,
        "faults__on_data_error": "skip",
        "run__timeout_s": 20.0,
    }
    return tiny_values(corpus, run_dir, **settings, **overrides)


def test_all_ranks_leave_out_what_one_cannot_read(corpus: Path, tmp_path: Path) -> None:
    values = values_of(corpus, tmp_path / "run")
    lines = train_pooled(values, OneRankCannotRead)
    bad = lines.pop(BAD_STEP - 1)
    assert bad["fault"] == "data error: skip"
    assert (bad["loss"], bad["grad_norm"], bad["tokens"]) == (None, None, 0)
    assert [line["fault"] for line in lines] == [None] * 4
    found = [(e["step"], e["event"], e["rank"]) for e in read_lines(tmp_path / "run" / EVENTS_FILE)]
    assert found == [(BAD_STEP, "data error", 1), (BAD_STEP, "skip", None)]
    assert (
        "train-00000.bin: document 3, token 17: is gone"
        in (tmp_path / "run" / EVENTS_FILE).read_text().splitlines()[1]
    )
    saved = find_checkpoints(tmp_path / "run")
    before, after = (stored_tensors(saved[number]) for number in (BAD_STEP - 2, BAD_STEP - 1))
    assert all(torch.equal(before[key], after[key]) for key in before)
    fresh = values | {
        "run.dir": str(tmp_path / "fresh"),
        "checkpoint.resume": str(saved[BAD_STEP - 1]),
    }
    rest = train_pooled(fresh)
    assert [comparable(line) for line in rest] == [comparable(line) for line in lines[-2:]]


def refused(
    rank: int, world: int, group: Any, values: dict[str, Any], patch: Callable[[], Any]
) -> str:
    """The user's error that ends a run."""
    with pytest.raises(UserError) as caught:
        training._train_on_rank(rank, world, group, values, patch)
    return str(caught.value)


def shard_removed_after_two_steps() -> Any:
    """What happens on disk, while the loader is some steps ahead."""
    after = Trainer._after_step

    def removed(self: Trainer, metrics: Any) -> Any:
        if metrics.step == 2 and self.session.is_main:
            (self.job.train.path / "train-00000.bin").unlink()
        return after(self, metrics)

    return mock.patch.object(Trainer, "_after_step", removed)


def test_a_shard_that_stays_away_ends_the_run(tmp_path: Path) -> None:
    corpus, run_dir = uneven_corpus(tmp_path), tmp_path / "run"
    values = values_of(corpus, run_dir, faults__max_in_a_row=2) | {"train.steps": 20}
    found = run_ranks(2, refused, values, shard_removed_after_two_steps)
    for message in found:
        assert "2 steps in a row went wrong" in message
        assert str(corpus / "train-00000.bin") in message
        assert "the file is missing" in message
    lines = read_lines(run_dir / METRICS_FILE)
    assert lines[-1]["fault"] == "data error: skip"
    assert len(lines) < 20


def test_by_default_the_run_ends_with_everything_saved(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    values = values_of(corpus, run_dir) | {"faults.on_data_error": "stop", "checkpoint.every": 0}
    for message in run_ranks(2, refused, values, OneRankCannotRead):
        assert message.startswith("train-00000.bin: document 3, token 17: is gone: step 3 cannot")
    (saved,) = find_checkpoints(run_dir)
    assert saved.name == f"step-{BAD_STEP - 1:06d}"
    # Repaired, it goes on as if nothing had been.
    rest = train_pooled(values)
    whole = train_pooled(values | {"run.dir": str(tmp_path / "whole")})
    assert [comparable(line) for line in rest] == [comparable(line) for line in whole]


def gathered(rank: int, world: int, group: Any) -> list[str]:
    return gather_lines(["", "über " * 1000, "b"][rank], group)


def test_lines_of_all_ranks() -> None:
    for found in run_ranks(3, gathered):
        assert found[0] == ""
        assert found[1] == ("über " * 1000).encode()[:2048].decode(errors="ignore")
        assert found[2] == "b"

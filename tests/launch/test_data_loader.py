"""The background loader: order, counts, errors and shutdown."""

import threading
from pathlib import Path

import numpy as np
import pytest

from ringattn.errors import UserError
from ringattn.launch.data_loader import Loader
from ringattn.launch.packing import IGNORE, Batches, PackedDataset
from tests.launch.corpora import small_corpus

STAGES = ((0, 48),)


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    return PackedDataset(small_corpus(tmp_path), "train", 48, seed=4)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ringattn-loader"]


def test_ranks_together_hold_the_step(dataset: PackedDataset) -> None:
    batches = Batches(stages=((0, 48), (3, 40)), dp=2, accumulate=3, batch=2)
    per_rank = []
    for rank in range(2):
        with Loader(dataset, batches, tuple, dp_rank=rank, start_step=2, stop_step=5) as loader:
            per_rank.append(list(loader))
    for steps in zip(*per_rank, strict=True):
        micro = [m for step in steps for m in step.micro]
        counted = sum(int((m.labels != IGNORE).sum()) for m in micro)
        assert [step.valid_tokens for step in steps] == [counted, counted]
        length = 48 if steps[0].step < 3 else 40
        assert all(m.plan == tuple(m.lengths) and sum(m.lengths) == 2 * length for m in micro)
        read = sorted(start for m in micro for start in m.starts)
        assert read == sorted(batches.starts(steps[0].step).flat)
        for m in micro:
            wanted = np.concatenate([dataset.read(start, length).tokens for start in m.starts])
            assert (m.tokens == wanted).all()
    assert [step.step for step in per_rank[0]] == [2, 3, 4]
    assert not loader_threads()


def test_plans_are_made_in_the_thread_and_not_too_far_ahead(dataset: PackedDataset) -> None:
    made: list[str] = []
    second = threading.Event()

    def make_plan(lengths: list[int]) -> int:
        made.append(threading.current_thread().name)
        if len(made) == 2:
            second.set()
        return len(lengths)

    with Loader(dataset, Batches(stages=STAGES), make_plan, stop_step=100, depth=2) as loader:
        assert second.wait(30)  # both are made before anything is taken
        next(loader)
    assert set(made) == {"ringattn-loader"}
    assert len(made) <= 4  # two ready, one more after the first was taken, one under way


def test_errors_surface_after_the_steps_before_them(dataset: PackedDataset) -> None:
    calls: list[int] = []

    def make_plan(lengths: list[int]) -> None:
        calls.append(len(lengths))
        if len(calls) == 3:
            raise KeyError("no plan today")

    with Loader(dataset, Batches(stages=STAGES), make_plan, stop_step=9) as loader:
        assert [next(loader).step, next(loader).step] == [0, 1]
        with pytest.raises(RuntimeError, match=r"step 2, tokens from \[\[96\]\].*no plan today"):
            next(loader)
        with pytest.raises(RuntimeError, match="step 2"):  # and again, rather than hang
            next(loader)
    assert not loader_threads()


def test_user_errors_keep_their_class(dataset: PackedDataset) -> None:
    def make_plan(lengths: list[int]) -> None:
        raise UserError("parallel.cp=3", "is odd", "use 2")

    with (
        Loader(dataset, Batches(stages=STAGES), make_plan, stop_step=9) as loader,
        pytest.raises(UserError, match=r"parallel\.cp=3"),
    ):
        next(loader)


def test_corrupt_record_is_named(tmp_path: Path) -> None:
    folder = small_corpus(tmp_path)
    with (folder / "train-00000.bin").open("r+b") as file:
        file.write((300).to_bytes(2, "little"))
    dataset = PackedDataset(folder, "train", 5000)
    with (
        Loader(dataset, Batches(stages=((0, 5000),)), len, stop_step=1) as loader,
        pytest.raises(UserError, match=r"train-00000\.bin: document 0, token 0: id 300"),
    ):
        next(loader)


def test_close_while_full_and_while_empty(dataset: PackedDataset) -> None:
    loader = Loader(dataset, Batches(stages=STAGES), len, stop_step=10**9, depth=1)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)
    with Loader(dataset, Batches(stages=STAGES), len, stop_step=0) as empty:
        assert list(empty) == []
    assert not loader_threads()


def test_bad_arguments(dataset: PackedDataset) -> None:
    with pytest.raises(UserError, match="dp_rank=2"):
        Loader(dataset, Batches(stages=STAGES, dp=2), len, dp_rank=2, stop_step=1)
    with pytest.raises(UserError, match="depth=0"):
        Loader(dataset, Batches(stages=STAGES), len, stop_step=1, depth=0)

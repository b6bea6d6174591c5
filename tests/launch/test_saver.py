"""Saves beside the training: the bits of their step, errors on all ranks, going back in a run."""

import contextlib
import errno
import json
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, read_state
from ringattn.launch.checkpoint_choice import read_run_id
from ringattn.launch.checkpoint_files import SummingWriter
from ringattn.launch.events import EVENTS_FILE
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.peers import ALONE, Peers
from ringattn.launch.saver import Saver
from ringattn.launch.snapshot import Snapshot, own_bytes, own_rows
from ringattn.launch.trainer import Trainer
from ringattn.parallel.host_memory import HostCopies
from ringattn.parallel.mesh import build_mesh
from tests.launch.checkpoints import comparable, stored_tensors, train_outcomes
from tests.launch.engines import ENGINES
from tests.launch.training import tiny_values, train_pooled, uneven_corpus
from tests.ranks import COLLECTIVE_TIMEOUT, run_ranks

HELD = 30.0  # seconds that a writer waits for a step at most; a test that runs into it fails


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def _values(corpus: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    values = tiny_values(corpus, run_dir, parallel__cp=2, train__steps=6, checkpoint__every=2)
    values |= {"checkpoint.keep": 0}
    return values | {key.replace("__", "."): value for key, value in changes.items()}


def _held_up() -> Any:
    """Every write waits until the training has done the step after the one that it saves."""
    trained, write, train = threading.Semaphore(0), SummingWriter.write_data, Trainer._train_step

    def held(self: SummingWriter, *args: Any, **kwargs: Any) -> Any:
        assert trained.acquire(timeout=HELD), "no step was trained while a checkpoint waited"
        return write(self, *args, **kwargs)

    def step(self: Trainer, batch: Any, began: float) -> Any:
        result = train(self, batch, began)
        if batch.step in (2, 4):
            trained.release()
        return result

    def last(self: Saver, *, last: bool = False) -> None:
        if last:
            trained.release()
        wait(self, last=last)

    wait, stack = Saver.wait, contextlib.ExitStack()
    stack.enter_context(mock.patch.object(SummingWriter, "write_data", held))
    stack.enter_context(mock.patch.object(Trainer, "_train_step", step))
    stack.enter_context(mock.patch.object(Saver, "wait", last))
    return stack


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero 2"])
def test_the_bits_of_the_step(engine: str, corpus: Path, tmp_path: Path) -> None:
    """Parameters change while the writer is held up; what it writes does not."""
    values = (
        _values(corpus, tmp_path / "front") | ENGINES[engine] | {"checkpoint.background": False}
    )
    expected = train_pooled(values)
    values |= {"run.dir": str(tmp_path / "back"), "checkpoint.background": True}
    assert comparable(train_pooled(values, _held_up)) == comparable(expected)
    saved = find_checkpoints(tmp_path / "back")
    assert [read_state(path).step for path in saved] == [2, 4, 6]
    for path in saved:
        want = stored_tensors(tmp_path / "front" / "checkpoints" / path.name)
        got = stored_tensors(path)
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), f"{path.name}: {name}"


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_writes_its_share(engine: str, corpus: Path, tmp_path: Path) -> None:
    train_pooled(_values(corpus, tmp_path / "run", train__steps=1) | ENGINES[engine])
    (path,) = find_checkpoints(tmp_path / "run")
    sizes = sorted(file.stat().st_size for file in path.glob("*.distcp"))
    assert len(sizes) == 2
    assert sizes[1] < 1.2 * sizes[0]  # the model is small, headers are not


def _failing_on(rank: int, step: int) -> Any:
    """A rank's disk is full during the save of a step."""
    write = SummingWriter.write_data

    def full(self: SummingWriter, *args: Any, **kwargs: Any) -> Any:
        if self.rank == rank and f"step-{step:06d}" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *args, **kwargs)

    return mock.patch.object(SummingWriter, "write_data", full)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_one_of_all(rank: int, corpus: Path, tmp_path: Path) -> None:
    """At the same step: when all have heard of it, at the latest when the next one is due."""
    run_dir = tmp_path / "run"
    outcomes = train_outcomes(_values(corpus, run_dir), partial(_failing_on, rank, 2))
    for error, _ in outcomes:
        assert error is not None
        assert "step-000002: cannot be written (No space left on device)" in error
    assert 2 <= len(read_lines(run_dir / METRICS_FILE)) <= 4
    assert not list((run_dir / "checkpoints").iterdir())


def test_an_error_is_passed_over(corpus: Path, tmp_path: Path) -> None:
    values = _values(corpus, tmp_path / "run", checkpoint__on_error="continue")
    (main, other) = train_outcomes(values, partial(_failing_on, 1, 2))
    assert (main[0], other) == (None, (None, ""))
    assert main[1].count("step-000002: cannot be written") == 1
    assert [read_state(p).step for p in find_checkpoints(tmp_path / "run")] == [4, 6]
    events = [json.loads(line) for line in (tmp_path / "run" / EVENTS_FILE).open()]
    assert [(event["event"], event["step"]) for event in events] == [("failed save", 2)]


def _failing_and_preempted() -> Any:
    """The save of step 2 fails, and a scheduler ends the job right then."""
    train, stack = Trainer._train_step, contextlib.ExitStack()

    def step(self: Trainer, batch: Any, began: float) -> Any:
        if batch.step == 1:
            self.session.request.signal = "SIGTERM"
        return train(self, batch, began)

    stack.enter_context(_failing_on(0, 2))
    stack.enter_context(mock.patch.object(Trainer, "_train_step", step))
    return stack


@pytest.mark.parametrize("background", [False, True])
def test_a_preempted_run_does_not_lose_a_failed_save(
    background: bool, corpus: Path, tmp_path: Path
) -> None:
    """It is tried again, and the end of the run is an error when it fails again."""
    values = _values(corpus, tmp_path / "run", checkpoint__on_error="continue")
    outcomes = train_outcomes(
        values | {"checkpoint.background": background}, _failing_and_preempted
    )
    for error, said in outcomes:
        assert error is not None
        assert "step-000002: cannot be written" in error
        assert "stopped after step" not in said


def _going_back(found: dict[str, Any]) -> Any:
    """After step 5 the trainer is taken back to its newest checkpoint, and ends there."""
    train = Trainer._train_step

    def step(self: Trainer, batch: Any, began: float) -> Any:
        result = train(self, batch, began)
        if batch.step == found["after"]:
            at = tuple(self.saver.restore())[:2]
            found["tensors"] = {
                name: (t.full_tensor() if isinstance(t, DTensor) else t).clone()
                for name, t in self.engine.tensors().items()
            }
            raise UserError("back", str(at), "")
        return result

    return mock.patch.object(Trainer, "_train_step", step)


def _goes_back(
    rank: int, world: int, group: Any, values: dict[str, Any], after: int
) -> tuple[str, dict[str, torch.Tensor]]:
    from tests.launch.checkpoints import _outcome

    found: dict[str, Any] = {"after": after}
    error, _ = _outcome(rank, world, group, values, lambda: _going_back(found))
    assert error is not None
    return error, found.get("tensors", {})


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero 3"])
def test_a_running_trainer_goes_back(engine: str, corpus: Path, tmp_path: Path) -> None:
    """To the newest checkpoint, also when its save is still under way."""
    values = _values(corpus, tmp_path / "run") | ENGINES[engine]
    results = run_ranks(2, _goes_back, values, 4)
    expected = stored_tensors(tmp_path / "run" / "checkpoints" / "step-000004")
    for error, tensors in results:
        assert error == "back: (4, 640); "
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name


def test_nothing_to_go_back_to(corpus: Path, tmp_path: Path) -> None:
    values = _values(corpus, tmp_path / "run", checkpoint__every=0)
    for error, _ in run_ranks(2, _goes_back, values, 2):
        assert "there is no checkpoint of this run yet" in error


def test_a_run_keeps_its_name(corpus: Path, tmp_path: Path) -> None:
    """Through a resumption; a run of another folder that starts from its checkpoint has its own."""
    values = _values(corpus, tmp_path / "run", train__steps=2)
    train_pooled(values)
    name = read_run_id(tmp_path / "run")
    train_pooled(values | {"train.steps": 4})
    saved = find_checkpoints(tmp_path / "run")
    assert {read_state(path).run_id for path in saved} == {name}
    values |= {"checkpoint.resume": str(saved[0]), "run.dir": str(tmp_path / "other")}
    train_pooled(values | {"train.steps": 4})
    (other,) = find_checkpoints(tmp_path / "other")
    assert read_state(other).run_id == read_run_id(tmp_path / "other") != name
    # Never resuming is a new run in the same folder.
    train_pooled(values | {"checkpoint.resume": "never", "run.dir": str(tmp_path / "run")})
    (again,) = find_checkpoints(tmp_path / "run")
    assert read_state(again).run_id == read_run_id(tmp_path / "run") != name
    assert read_run_id(tmp_path / "run" / "previous-1") == name


def _agree(rank: int, world: int, group: Any) -> list[Any]:
    peers, found = Peers(group), []

    def fail(kind: type[Exception], *args: Any) -> int:
        if rank == 1:
            raise kind(*args)
        return rank

    found.append(peers.agree(lambda: rank, sum))
    for work in (
        partial(fail, UserError, "a", "b", "c"),
        partial(fail, OSError, errno.EROFS, "read-only", "file"),
        partial(fail, ZeroDivisionError, "no"),
    ):
        try:
            peers.agree(work, sum)
        except (UserError, OSError, RuntimeError) as error:
            found.append((type(error).__name__, str(error)))
    try:
        peers.share(lambda: 1 // 0)
    except RuntimeError as error:
        found.append(str(error))
    return found


def test_ranks_agree() -> None:
    want = [
        3,
        ("UserError", "a: b; c"),
        ("OSError", "[Errno 30] read-only: 'file'"),
        ("RuntimeError", "ZeroDivisionError: no"),
        "ZeroDivisionError: integer division or modulo by zero",
    ]
    assert run_ranks(3, _agree) == [want] * 3
    assert ALONE.agree(lambda: 2, sum) == 2


def _rows(rank: int, world: int, _group: Any) -> tuple[int, list[bool]]:
    mesh = build_mesh("cpu", dp=1, cp=world, timeout=COLLECTIVE_TIMEOUT).world_mesh()
    tensors = {
        "matrix": torch.arange(70.0).view(7, 10),
        "one row": torch.ones(1, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
    }
    snapshot = Snapshot(HostCopies(), mesh)
    equal, rows = [], {}
    for _ in range(2):
        rows = own_rows(tensors, lambda _: mesh)
        taken = snapshot.take(rows)
        for name, copy in taken.items():
            tensors[name].add_(1)  # after the copy
            whole = copy.full_tensor() if isinstance(copy, DTensor) else copy
            equal.append(torch.equal(whole, tensors[name] - 1))
    return own_bytes(rows), equal


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_of_a_snapshot(world: int) -> None:
    results = run_ranks(world, _rows)
    for _, equal in results:
        assert all(equal)
        assert len(equal) == 8
    total = sum(size for size, _ in results)
    assert total == 280 + 12 + 5 + 4 * world

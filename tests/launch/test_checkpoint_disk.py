"""A disk that is full, read-only or gone: a clear line by policy, nothing half-written."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest

from ringattn.errors import UserError
from ringattn.launch import checkpoint_writer
from ringattn.launch.append_file import AppendFile
from ringattn.launch.checkpoint import find_checkpoints
from ringattn.launch.checkpoint_writer import SaveError
from ringattn.launch.metrics import METRICS_FILE, MetricsWriter, read_lines
from ringattn.launch.trainer import Trainer
from ringattn.launch.write_policy import WritePolicy
from tests.launch.checkpoints import save, sound_checkpoints, train_outcomes
from tests.launch.test_train_parts import metrics_of
from tests.launch.training import tiny_values, train_pooled, uneven_corpus

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A tmpfs; skips with the reason where this process may not mount one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("mounting a small disk needs the command mount")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mounting a small disk: {error.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    with mounted(tmp_path / "disk", "size=1m"):
        yield tmp_path / "disk"


def fill(folder: Path, leave: int = 0) -> None:
    """Leaves so many bytes of a disk free."""
    with (folder / "filler").open("ab", buffering=0) as file:
        left = shutil.disk_usage(folder).free - leave
        while left > 0:
            left -= file.write(bytes(min(left, 4096)))


def test_room_is_looked_for_first(disk: Path) -> None:
    first = save(disk, 4)
    fill(disk, leave=8192)
    with pytest.raises(SaveError) as caught:
        save(disk, 8)
    text = str(caught.value)
    assert "\n" not in text
    assert str(disk / "checkpoints" / "step-000008") in text
    assert "No space left on device" in text
    assert "8,192 are free" in text
    assert "needs 28," in text  # 24,004 bytes of tensors, and what stands around them
    assert list(first.parent.iterdir()) == [first]
    assert sound_checkpoints(disk) == [first]
    (disk / "filler").unlink()
    second = save(disk, 8)
    assert sound_checkpoints(disk) == [second, first]


@pytest.mark.parametrize("leave", [0, 4096, 16384, 28672])
def test_full_in_the_middle(leave: int, disk: Path) -> None:
    """Another program took the room that there was."""
    first = save(disk, 4)
    fill(disk, leave)
    usage = shutil.disk_usage(disk)._replace(free=1 << 40)
    with (
        mock.patch.object(checkpoint_writer.shutil, "disk_usage", return_value=usage),
        pytest.raises(SaveError, match="No space left on device.*free some space"),
    ):
        save(disk, 8)
    assert list(first.parent.iterdir()) == [first]
    assert sound_checkpoints(disk) == [first]


def test_read_only(tmp_path: Path) -> None:
    first = save(tmp_path / "disk", 4)
    shutil.move(tmp_path / "disk", tmp_path / "kept")
    with mounted(tmp_path / "disk", "size=1m"):
        shutil.copytree(tmp_path / "kept", tmp_path / "disk", dirs_exist_ok=True)
        remount = ["mount", "-o", "remount,ro", str(tmp_path / "disk")]
        subprocess.run(remount, check=True)
        with pytest.raises(SaveError, match="Read-only file system.*make run.dir writable"):
            save(tmp_path / "disk", 8)
        assert sound_checkpoints(tmp_path / "disk") == [first]


def test_over_quota(tmp_path: Path) -> None:
    first = save(tmp_path, 4)
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with (
        mock.patch.object(checkpoint_writer.os, "fsync", side_effect=error),
        pytest.raises(SaveError, match="quota exceeded.*free some space"),
    ):
        save(tmp_path, 8)
    assert list(first.parent.iterdir()) == [first]


def test_records_wait_for_room(disk: Path) -> None:
    """No torn record stays in the middle of a file, and none is lost."""
    fill(disk, leave=4096)
    file = AppendFile(disk / "lines")
    records = [f"{i:04d} ".encode() + b"x" * 1500 + b"\n" for i in range(8)]
    for number, record in enumerate(records):
        if number == 7:
            (disk / "filler").unlink()
        if number in (0, 1, 7):
            file.append(record)
        else:
            with pytest.raises(OSError, match="No space left"):
                file.append(record)
            assert (disk / "lines").read_bytes() == b"".join(records[:2])
    file.close()
    assert (disk / "lines").read_bytes() == b"".join(records)


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_metrics_on_a_full_disk(on_error: Literal["stop", "continue"], disk: Path) -> None:
    said: list[str] = []
    writer = MetricsWriter(disk, 0, WritePolicy(on_error, said.append))
    fill(disk)
    ends = pytest.raises(UserError, match="metrics.jsonl: cannot be written")
    with ends if on_error == "stop" else contextlib.nullcontext():
        for step in range(1, 101):
            writer.write_step(metrics_of(step))
    if on_error == "continue":
        assert [line.split(": ")[0] for line in said] == [
            str(disk / METRICS_FILE), str(disk / "tensorboard")
        ]  # fmt: skip
        (disk / "filler").unlink()
        writer.write_step(metrics_of(101))
        assert [line["step"] for line in read_lines(disk / METRICS_FILE)] == [*range(1, 102)]
    writer.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def _before_save(step: int, act: Callable[[Path], None]) -> Any:
    """Rank 0 acts on the run's folder between the save at a step and the one before it."""
    save_step = Trainer._save

    def acting(self: Trainer, at: int) -> None:
        if at == step:
            self.saver.wait()
            if self.session.is_main:
                act(self.run_dir)
        save_step(self, at)

    return mock.patch.object(Trainer, "_save", acting)


def _leave_little(run_dir: Path) -> None:
    fill(run_dir, leave=65536)


def _nearly_full_at_4() -> Any:
    return _before_save(4, _leave_little)


def _nearly_full_from_4_to_6() -> Any:
    stack = contextlib.ExitStack()
    stack.enter_context(_before_save(4, _leave_little))
    stack.enter_context(_before_save(6, _empty))
    return stack


def _empty(run_dir: Path) -> None:
    (run_dir / "filler").unlink()


def _gone_at_4() -> Any:
    return _before_save(4, _remove)


def _remove(run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    run_dir.write_text("a file in the way")


def _values(corpus: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    values = tiny_values(corpus, run_dir, parallel__cp=2, train__steps=8, checkpoint__every=2)
    return values | {key.replace("__", "."): value for key, value in changes.items()}


@pytest.mark.parametrize("background", [True, False])
def test_training_stops(background: bool, corpus: Path, tmp_path: Path) -> None:
    """All ranks alike: by the next save, or at once in the foreground; then it is resumed."""
    with mounted(tmp_path / "run", "size=32m"):
        values = _values(corpus, tmp_path / "run", checkpoint__background=background)
        outcomes = train_outcomes(values, _nearly_full_at_4)
        for error, _ in outcomes:
            assert error is not None
            assert "step-000004: cannot be written (No space left on device): needs" in error
        assert outcomes[0][1].count("\nringattn") == 0
        done = len(read_lines(tmp_path / "run" / METRICS_FILE))
        assert 4 <= done <= (6 if background else 4)
        assert [p.name for p in find_checkpoints(tmp_path / "run")] == ["step-000002"]
        _empty(tmp_path / "run")
        assert [line["step"] for line in train_pooled(values)] == [*range(1, 9)]


def test_training_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Said once, tried again, no step lost."""
    with mounted(tmp_path / "run", "size=32m"):
        values = _values(corpus, tmp_path / "run", checkpoint__on_error="continue")
        (main, other) = train_outcomes(values, _nearly_full_from_4_to_6)
        assert main[0] is None
        assert other == (None, "")
        said = [line for line in main[1].splitlines() if line.startswith("ringattn: ")]
        assert len(said) == 1
        assert "step-000004: cannot be written" in said[0]
        assert "training goes on" in said[0]
        names = [path.name for path in find_checkpoints(tmp_path / "run")]
        assert names == ["step-000002", "step-000006", "step-000008"]
        assert len(read_lines(tmp_path / "run" / METRICS_FILE)) == 8


def test_the_last_save_is_an_error_in_any_case(corpus: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "run", "size=32m"):
        values = _values(corpus, tmp_path / "run", checkpoint__on_error="continue", train__steps=4)
        for error, _ in train_outcomes(values, _nearly_full_at_4):
            assert error is not None
            assert "step-000004: cannot be written" in error


def test_the_run_folder_is_gone(corpus: Path, tmp_path: Path) -> None:
    values = _values(corpus, tmp_path / "run", checkpoint__on_error="continue")
    (main, other) = train_outcomes(values, _gone_at_4)
    for error, _ in (main, other):
        assert error is not None
        assert "step-000008: cannot be written (Not a directory)" in error
    assert "Traceback" not in main[1]
    assert "metrics.jsonl: cannot be written" in main[1]

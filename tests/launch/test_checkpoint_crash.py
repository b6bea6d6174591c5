"""A process that ends at any moment of a save leaves the last complete checkpoint."""

import itertools
import os
import random
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ringattn.launch.checkpoint_choice import list_checkpoints
from ringattn.launch.checkpoint_files import _SummingFile
from ringattn.launch.checkpoint_writer import Retention
from tests.launch.checkpoints import problems_of, save, sound_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
KEEP_ONE = Retention(keep=1)


def _in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process that ends without any cleaning up; its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _ending_at(count: int, work: Callable[[], object]) -> None:
    """Runs `work`, and ends the process at the `count`-th thing that it does to the disk: before
    it, and in the middle of a write."""
    counter = itertools.count()

    def ending(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(counter) == count:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    write = _SummingFile.write

    def torn(self: _SummingFile, data: Any, /) -> int:
        if next(counter) == count:
            write(self, memoryview(data)[: len(data) // 2])
            os._exit(9)
        return write(self, data)

    names = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir")
    with mock.patch.object(_SummingFile, "write", torn):
        for name in names:
            mock.patch.object(os, name, ending(getattr(os, name))).start()
        work()


@pytest.mark.parametrize("step", [8, 4], ids=["a new step", "the same step again"])
def test_a_crash_at_any_operation(step: int, tmp_path: Path) -> None:
    ended = 0
    for count in range(100):
        run_dir = tmp_path / str(count)
        save(run_dir, 4)
        work = lambda folder=run_dir: save(folder, step, retention=KEEP_ONE)  # noqa: E731
        code = _in_child(lambda at=count, run=work: _ending_at(at, run))
        assert code in (0, 9)
        # At every moment one is complete, and none that stands under its name is not.
        assert sound_checkpoints(run_dir), f"operation {count}"
        for path in list_checkpoints(run_dir):
            assert not problems_of(path), f"operation {count}"
        # The next save cleans up.
        last = save(run_dir, 12, retention=KEEP_ONE)
        assert list(last.parent.iterdir()) == [last]
        if code == 0:
            break
        ended += 1
    else:
        raise AssertionError("a save of more than 100 operations")
    assert ended > 10


@pytest.mark.full
def test_kills_at_random_moments(tmp_path: Path, seed: int) -> None:
    """SIGKILL of a process that saves one checkpoint after another, 30 times."""
    draw, step = random.Random(seed), 4
    save(tmp_path, step)
    for _ in range(30):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            for number in itertools.count(step + 1):
                save(tmp_path, number, retention=Retention(keep=2))
                os.write(write, f"{number}\n".encode())
        os.close(write)
        until = time.monotonic() + draw.uniform(0.0, 0.2)
        told = b""
        while (left := until - time.monotonic()) > 0:
            if select.select([read], [], [], left)[0]:
                told += os.read(read, 1 << 16)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(read, 1 << 16):
            told += more
        os.close(read)
        newest = int(sound_checkpoints(tmp_path)[0].name[5:])
        assert newest >= max([step, *map(int, told.split())])
        for path in list_checkpoints(tmp_path):
            assert not problems_of(path)
        step = newest

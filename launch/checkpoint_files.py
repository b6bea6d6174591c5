"""Checksums of a checkpoint's files: taken while they are written, compared before reading."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from ringattn.errors import UserError
from ringattn.launch.checkpoint_state import STATE_FILE, CheckpointState, FileSum, read_state
from ringattn.launch.peers import Peers

_BUFFER_BYTES = 1 << 20


class SummingWriter(FileSystemWriter):
    """Writes tensors as its base class does, and knows the sums of the bytes it meant to write.

    Attributes:
        sums: of the files written by this process, by name.
    """

    def __init__(self, path: Path) -> None:
        # Tensors lie in host memory or are copied one by one: nothing is copied ahead on a stream,
        # which from another thread would be one of the first GPU.
        super().__init__(path, sync_files=False, overwrite=False, per_thread_copy_ahead=0)
        self.fs = self._files = _SummingFiles()  # which brings every file to the disk itself

    @property
    def sums(self) -> dict[str, FileSum]:
        """See the class."""
        return self._files.sums

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """See the base class; a full disk is an `OSError`, whatever the layers made of it."""
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            if self._files.failure is not None:
                raise self._files.failure from error
            raise


def find_problems(path: Path, state: CheckpointState, peers: Peers) -> list[str]:
    """What is wrong with a checkpoint's files, a line per file; every rank calls it together.

    Each rank reads its share of the files, the first one looks for files too many.

    Args:
        path: the checkpoint.
        state: what its state.json says.
        peers: the ranks.

    Returns:
        The same lines on every rank, by name of the file; none when all is well.
    """
    own = sorted(state.files)[peers.rank :: peers.world]

    def work() -> list[str]:
        found = _unlisted(path, state) if peers.is_main else []
        return found + [line for name in own if (line := _problem_of(path, name, state))]

    return peers.agree(work, lambda parts: sorted(line for part in parts for line in part))


def check_files(path: Path, names: set[str], peers: Peers) -> None:
    """Compares some files of a checkpoint with their sums; every rank calls it together.

    Raises:
        UserError: naming the first file that is missing, truncated or damaged.
    """
    state = read_state(path)
    own = sorted(names)[peers.rank :: peers.world]

    def work() -> str | None:
        return next((line for name in own if (line := _problem_of(path, name, state))), None)

    line = peers.agree(work, lambda lines: next((line for line in lines if line), None))
    if line is not None:
        raise UserError(f"checkpoint {path}", line, "name another checkpoint")


def _problem_of(path: Path, name: str, state: CheckpointState) -> str | None:
    want = state.files.get(name)
    if want is None:
        return f"file {name} is foreign: no part of this checkpoint"
    try:
        size = (path / name).stat().st_size
        if size < want.size:
            return f"file {name} is truncated: {size:,} of {want.size:,} bytes"
        with (path / name).open("rb") as file:
            got = FileSum(size, hashlib.file_digest(file, "sha256").hexdigest())
    except FileNotFoundError:
        return f"file {name} is missing"
    except OSError as error:
        return f"file {name} cannot be read ({error.strerror})"
    if got == want:
        return None
    if (other := _owner(path, got)) is not None:
        return f"file {name} is foreign: one of {other}"
    return f"file {name} is damaged: its sha256 differs"


def _owner(path: Path, found: FileSum) -> str | None:
    """Name of the checkpoint beside this one that a file with these bytes belongs to."""
    for sibling in sorted(path.parent.glob("step-*")):
        try:
            if sibling != path and found in read_state(sibling).files.values():
                return sibling.name
        except UserError:
            continue
    return None


def _unlisted(path: Path, state: CheckpointState) -> list[str]:
    """Files too many. Hidden ones may be of the file system's own making."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return [f"the folder cannot be read ({error.strerror})"]
    extra = [n for n in names if n not in state.files and n != STATE_FILE and n[0] != "."]
    return [f"file {name} is foreign: no part of this checkpoint" for name in extra]


class _SummingFile(io.FileIO):
    """A new file whose bytes are summed on the way to the disk, and on the disk when it is closed.

    Attributes:
        failure: of the last write or flush to the disk that failed, or None.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.failure: OSError | None = None
        self._digest, self._written = hashlib.sha256(), 0

    @property
    def sum(self) -> FileSum:
        """Of what was written so far."""
        return FileSum(self._written, self._digest.hexdigest())

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = error
            raise
        self._digest.update(memoryview(data)[:written])
        self._written += written
        return written

    def close(self) -> None:
        try:
            if not self.closed:
                os.fsync(self.fileno())
        except OSError as error:
            self.failure = self.failure or error
            raise
        finally:
            super().close()


class _SummingFiles(FileSystem):
    """The local file system; keeps the sums of the files that it wrote."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        raw = None
        try:
            raw = _SummingFile(Path(path))
            with io.BufferedWriter(raw, _BUFFER_BYTES) as stream:
                yield cast(io.IOBase, stream)
            self.sums[Path(path).name] = raw.sum
        except OSError as error:
            self.failure = error
            raise
        finally:
            if raw is not None:
                self.failure = self.failure or raw.failure

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)

"""A file that grows by whole records, on a disk that may be full for a while."""

import os
from pathlib import Path


class AppendFile:
    """Appends records; those that cannot be written wait and are written before the next one.

    The file never holds part of a record with another one behind it: what a failed write left is
    cut off.

    Args:
        path: opened for appending, made if it is not there.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: a record is the file's, or it is here.
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)
        self._waiting = bytearray()

    def append(self, record: bytes) -> None:
        """Appends a record after those that wait.

        Raises:
            OSError: it waits now. At most `_KEPT` bytes wait; beyond them records are lost.
        """
        if len(self._waiting) + len(record) <= _KEPT:
            self._waiting += record
        if not self.path.exists():
            # The folder was removed: bytes would go to a file that nobody can open.
            raise FileNotFoundError(2, os.strerror(2), str(self.path))
        try:
            written = 0
            while written < len(self._waiting):
                written += self._file.write(memoryview(self._waiting)[written:])
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += written
        self._waiting = bytearray()

    def close(self) -> None:
        """Closes the file; records that still wait are lost."""
        self._file.close()


_KEPT = 1 << 24

"""Records from files and folders of JSON lines."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringattn.benchmarks.record import Record, read_records
from ringattn.errors import UserError

_MAPPINGS = ("hardware", "versions", "config", "figures")


@dataclass(frozen=True)
class Loaded:
    """Records in the order of files and lines.

    Attributes:
        records: each case of each machine once; the last of the same is kept.
        files: name and number of records of each file.
        replaced: records left out because a later one has the same case on the same hardware.
    """

    records: tuple[Record, ...]
    files: tuple[tuple[str, int], ...]
    replaced: int


def load(paths: Sequence[str | os.PathLike[str]]) -> Loaded:
    """Reads all files; folders stand for their .jsonl files, at any depth.

    Raises:
        UserError: a path that is not there, cannot be read or holds no record, or a line that is
            none.
    """
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    read = [(file, _records(file)) for file in files]
    records = [record for _, part in read for record in part]
    if not records:
        raise UserError(
            ", ".join(str(path) for path in paths) or "no path",
            "holds no record",
            "name a file that a benchmark has written",
        )
    kept = {(r.name, r.case, str(r.hardware)): r for r in records}
    names = tuple((file.name, len(part)) for file, part in read)
    return Loaded(tuple(kept.values()), names, len(records) - len(kept))


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        found = sorted(path.rglob("*.jsonl"))
        if not found:
            raise UserError(
                str(path), "is a folder without .jsonl files", "name one that benchmarks wrote to"
            )
        return found
    if not path.exists():
        raise UserError(str(path), "does not exist", "name a file or a folder of records")
    return [path]


def _records(file: Path) -> list[Record]:
    try:
        records = read_records(file)
    except OverflowError:
        raise UserError(
            str(file), "is not a file of benchmark records", "name a .jsonl file"
        ) from None
    for line, record in enumerate(records, start=1):
        texts = (record.name, record.case, record.unit, record.reason)
        wrong = [name for name in _MAPPINGS if not isinstance(getattr(record, name), dict)]
        if wrong or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{file.name}:{line}",
                f"is not a benchmark record: {wrong[0] if wrong else 'name or case'} is of a wrong "
                "kind",
                "remove the line",
            )
    return records

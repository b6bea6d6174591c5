"""Documents of a corpus source: text, JSONL and Parquet files, folders of those, or "stdlib"."""

import json
import os
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringattn.errors import UserError

MAX_DOCUMENT_BYTES = 1 << 30
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_SNIFF_BYTES = 8192


@dataclass(frozen=True)
class Document:
    """One document: its text, and a name for messages such as "notes.jsonl:17"."""

    name: str
    text: str


@dataclass
class Source:
    """The documents of `source` in a fixed order: files by sorted path, records by position.

    Memory is bounded by one document (a text file without `separator` is one), one JSONL line or
    one Parquet batch.

    Args:
        source: a file, a folder (read recursively; hidden and binary files are skipped), or
            "stdlib": the .py files of the running interpreter's standard library.
        separator: text files are cut into documents at this string; None keeps a file whole.

    Attributes:
        skipped: inputs left out so far, by reason.

    Raises (while iterating):
        UserError: naming the file, and the line or row, that cannot be read.
    """

    source: str | Path
    separator: str | None = None
    skipped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.separator == "":
            raise UserError("separator=''", "must not be empty", "leave it out, or name a string")

    def __iter__(self) -> Iterator[Document]:
        try:
            yield from self._documents()
        except OSError as error:
            where = error.filename or self.source
            raise _unreadable(where, "cannot be read", error) from None

    def _documents(self) -> Iterator[Document]:
        if str(self.source) == "stdlib":
            yield from self._stdlib()
            return
        path = Path(self.source)
        if path.is_dir():
            for file in _files(path):
                if _is_binary(file):
                    self.skipped["binary file"] += 1
                else:
                    yield from self._file(file)
        elif path.is_file():
            if _is_binary(path):
                raise UserError(str(path), "is binary", "give text, .jsonl or .parquet files")
            yield from self._file(path)
        else:
            raise UserError(
                f"source={str(self.source)!r}",
                "is no file and no folder",
                'check the path, or use "stdlib" for the Python standard library',
            )

    def _file(self, path: Path) -> Iterator[Document]:
        suffix = path.suffix.lower()
        if suffix in (".jsonl", ".ndjson"):
            yield from _jsonl(path)
        elif suffix == ".parquet":
            yield from self._parquet(path)
        else:
            yield from _text(path, self.separator)

    def _stdlib(self) -> Iterator[Document]:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in _files(root):
            if path.suffix != ".py":
                continue
            try:
                with tokenize.open(path) as file:  # honours the file's own coding line
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                self.skipped["undecodable source file"] += 1  # test data, broken on purpose
                continue
            yield Document(path.relative_to(root).as_posix(), text)

    def _parquet(self, path: Path) -> Iterator[Document]:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(
                str(path),
                "needs the package pyarrow",
                'install it with: pip install "ringattn[hf]"',
            ) from None
        try:
            file = parquet.ParquetFile(path)
        except Exception as error:  # pyarrow raises several unrelated classes
            raise _unreadable(path, "is no Parquet file", error) from None
        with file:
            if "text" not in file.schema_arrow.names:
                raise UserError(
                    f"{path}: columns {', '.join(file.schema_arrow.names)}",
                    'must include "text"',
                    "rename the text column",
                )
            yield from self._rows(path, file)

    def _rows(self, path: Path, file: Any) -> Iterator[Document]:
        row = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for value in batch.column(0).to_pylist():
                    if value is None:
                        self.skipped["null text"] += 1
                    else:
                        yield _record(f"{path}:row {row}", value)
                    row += 1
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            if isinstance(error, UserError):
                raise
            raise _unreadable(path, f"cannot be read from row {row} on", error) from None


def _files(root: Path) -> Iterator[Path]:
    """Files below `root` in sorted order, without hidden ones and installed packages."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in _NOT_STDLIB and not name.startswith(".")
        )
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder) / name


def _is_binary(path: Path) -> bool:
    if path.suffix.lower() == ".parquet":
        return False
    with path.open("rb") as file:
        return b"\0" in file.read(_SNIFF_BYTES)


def _text(path: Path, separator: str | None) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if separator is None:
                _check_size(path)
                yield Document(str(path), file.read())
                return
            number, rest = 0, ""
            while piece := file.read(1 << 20):
                *whole, rest = (rest + piece).split(separator)
                for text in whole:
                    yield Document(f"{path}:document {number}", text)
                    number += 1
            yield Document(f"{path}:document {number}", rest)
    except UnicodeDecodeError as error:
        raise _unreadable(path, "is not UTF-8", error) from None


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{path}: {size} bytes",
            f"one document may have at most {MAX_DOCUMENT_BYTES}",
            "name a separator that divides the file into documents, or use JSONL",
        )


def _jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise _unreadable(name, "is no line of JSON", error) from None
            if not isinstance(record, dict) or "text" not in record:
                raise UserError(name, 'must be an object with the key "text"', "add the key")
            yield _record(name, record["text"])


def _record(name: str, text: object) -> Document:
    if not isinstance(text, str):
        raise UserError(
            f"{name}: text={str(text)[:40]!r}", "must be a string", "correct the record"
        )
    return Document(name, text)


def _unreadable(where: Path | str, rule: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(str(where), f"{rule} ({reason})", "repair the file or leave it out")

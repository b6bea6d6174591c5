"""The one schema of benchmark results: JSON lines, one object per figure.

    recorder = Recorder("results.jsonl")
    recorder.ok("attention", "causal-16k-bf16", 812.5, "ms", spread=3.1, config={"heads": 8})
    recorder.refused("attention", "causal-16k-fp8", "ms", "dtype fp8: no kernel computes it")

Fields: name, case, value, unit, spread, status (ok, refused, error), reason, hardware, versions,
commit, config, figures. No host names and no personal paths: they are taken out of reasons and
configs.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch

from ringattn.errors import UserError
from ringattn.parallel.host import cpu_name

STATUSES = ("ok", "refused", "error")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One figure, or why there is none.

    Args:
        name: the benchmark, e.g. ``"attention"``.
        case: what was measured, unique within name, e.g. ``"causal-16k-h8-d64-bf16-ring"``.
        value: the figure (a median where there are repetitions); None unless status is ``ok``.
        unit: unit of value and spread, e.g. ``"ms"``, ``"ratio"``, ``"bytes"``.
        spread: half the interquartile range of the repetitions; None for a single or exact one.
        status: ``ok``, ``refused`` (impossible by rule) or ``error`` (should work and did not).
        reason: one line; empty if and only if status is ``ok``.
        hardware: see `hardware`.
        versions: see `versions`.
        commit: see `commit`.
        config: every parameter of the case, JSON values only.
        figures: further figures of the same run by name with their unit, such as ``wire_bytes``.

    Raises UserError for a field that breaks these rules.
    """

    name: str
    case: str
    value: float | None
    unit: str
    spread: float | None = None
    status: str = "ok"
    reason: str = ""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    commit: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise UserError(f"status={self.status!r}", f"is one of {STATUSES}", "use one of them")
        if not self.name or not self.case or not self.unit:
            raise UserError(
                f"name={self.name!r} case={self.case!r} unit={self.unit!r}",
                "none of them may be empty",
                "name what was measured",
            )
        ok = self.status == "ok"
        if ok != (self.value is not None) or ok == bool(self.reason):
            raise UserError(
                f"status={self.status} value={self.value} reason={self.reason!r}",
                "ok has a value and no reason, refused and error have a reason and no value",
                "give what the status asks for",
            )
        numbers = {"value": self.value, "spread": self.spread} | dict(self.figures)
        for key, number in numbers.items():
            if number is not None and not math.isfinite(number):
                raise UserError(f"{key}={number}", "must be finite", "record an error instead")

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @staticmethod
    def from_json(line: str) -> "Record":
        """Reads one line. Raises UserError when it is not a record of this schema."""
        try:
            return Record(**json.loads(line))
        except (TypeError, json.JSONDecodeError) as error:
            raise UserError(
                line.strip()[:80], f"is not a benchmark record: {error}", "remove the line"
            ) from None


class Recorder:
    """Appends records to a JSON-lines file, each flushed when it is made.

    ``has`` tells which cases the file holds, so that an interrupted benchmark can go on. The file
    and its folder are created with the first record. A last line that was cut off, by a kill or a
    full disk, is taken out. Raises UserError for a file with other lines.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        text = _text_of(self.path)
        if (whole := _whole_lines(text)) != text:
            self.path.write_text(whole, encoding="utf-8")
        self._done = {(r.name, r.case) for r in _records(whole, self.path.name)}

    @cached_property
    def _machine(self) -> dict[str, Any]:
        return {"hardware": hardware(), "versions": versions(), "commit": commit()}

    def __len__(self) -> int:
        """How many cases the file holds."""
        return len(self._done)

    def has(self, name: str, case: str) -> bool:
        """Whether the case has a record, whatever its status."""
        return (name, case) in self._done

    def ok(
        self,
        name: str,
        case: str,
        value: float,
        unit: str,
        *,
        spread: float | None = None,
        config: Mapping[str, Any] | None = None,
        figures: Mapping[str, float | None] | None = None,
    ) -> Record:
        """Records a figure."""
        return self._write(
            name=name, case=case, value=value, unit=unit, spread=spread, config=config or {},
            figures=figures or {},
        )  # fmt: skip

    def refused(
        self, name: str, case: str, unit: str, reason: str, config: Mapping[str, Any] | None = None
    ) -> Record:
        """Records a case that is impossible by rule."""
        return self._write(
            name=name,
            case=case,
            value=None,
            unit=unit,
            status="refused",
            reason=reason,
            config=config or {},
        )

    def error(
        self, name: str, case: str, unit: str, reason: str, config: Mapping[str, Any] | None = None
    ) -> Record:
        """Records a case that should have worked."""
        return self._write(
            name=name,
            case=case,
            value=None,
            unit=unit,
            status="error",
            reason=reason,
            config=config or {},
        )

    def _write(self, *, config: Mapping[str, Any], reason: str = "", **values: Any) -> Record:
        record = Record(
            **values,
            reason=anonymous(" ".join(reason.split())),
            config=anonymous(dict(config)),
            **self._machine,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
        self._done.add((record.name, record.case))
        return record


def _whole_lines(text: str) -> str:
    """A file's text without a last record that was cut off, by a kill or a full disk."""
    head, newline, tail = text.rpartition("\n")
    if not tail.startswith("{"):
        return text
    try:
        Record.from_json(tail)
    except UserError:
        return head + newline
    return text + "\n"


def _text_of(path: Path) -> str:
    """A file's text; "" where there is none."""
    if not path.exists():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
        raise UserError(str(path), why, "name another file") from None
    except UnicodeDecodeError:
        what = "is not a file of benchmark records"
        raise UserError(str(path), what, "name a .jsonl file") from None


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file, [] where there is none.

    A last line that was cut off is passed over. Raises UserError naming a wrong line.
    """
    path = Path(path)
    return _records(_whole_lines(_text_of(path)), path.name)


def _records(text: str, name: str) -> list[Record]:
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            records.append(Record.from_json(line))
        except UserError as error:
            raise UserError(f"{name}:{number}: {error.what}", error.rule, error.fix) from None
    return records


@dataclass(frozen=True)
class Tally:
    """How many records of a file are figures, refusals and errors.

    Attributes:
        reasons: of refusals, the most common first, each with its count.
    """

    figures: int
    refusals: int
    errors: int
    reasons: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "Tally":
        """Of a file's records."""
        records = read_records(path)
        found = [record.status for record in records]
        reasons = Counter(record.reason for record in records if record.status == "refused")
        figures, refusals, errors = (found.count(status) for status in STATUSES)
        return cls(figures, refusals, errors, tuple(reasons.most_common()))

    def __str__(self) -> str:
        return f"{self.figures} figures, {self.refusals} refusals, {self.errors} errors"


def keep_figures(path: str | os.PathLike[str]) -> None:
    """Takes refusals and errors out of a file, so that they are measured again."""
    path, kept = Path(path), [r for r in read_records(path) if r.status == "ok"]
    if path.exists():
        new = path.with_suffix(".new")
        new.write_text("".join(record.to_json() + "\n" for record in kept), encoding="utf-8")
        os.replace(new, path)


def refused(error: UserError) -> NoReturn:
    """Ends a command with the error's one line and exit code 2, that of a user's mistake."""
    print(error, file=sys.stderr)
    sys.exit(2)


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB; GPU name (None without) and count."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
    }


def versions() -> dict[str, str | None]:
    """Versions of python, torch, its CUDA, numpy and ringattn (None where there is none)."""
    try:
        own = importlib.metadata.version("ringattn")
    except importlib.metadata.PackageNotFoundError:
        own = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "ringattn": own,
    }


def commit() -> str | None:
    """Hash of the checkout this module runs from, ``-dirty`` with changes; None outside one."""
    here = Path(__file__).resolve()
    root = _git(here.parent, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside the checkout of another project.
    if root is None or here.parent.parent != Path(root).resolve():
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def anonymous(value: Any) -> Any:
    """The value with home, working folder and host name taken out of every string in it."""
    if isinstance(value, Mapping):
        return {anonymous(key): anonymous(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [anonymous(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        if len(folder.parts) > 1:
            value = re.sub(rf"{re.escape(str(folder))}(?![\w-])", short, value)
    host = platform.node()
    return re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "HOST", value) if host else value


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        return None


SCHEMA = tuple(f.name for f in fields(Record))

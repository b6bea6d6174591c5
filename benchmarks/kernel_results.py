"""Records of the kernel benchmark, found by case: for tables, bars and the selector's table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ringattn.benchmarks.kernel_cases import Case
from ringattn.benchmarks.record import Record, read_records
from ringattn.kernels.measured import Row, Work
from ringattn.kernels.select import kernel_order
from ringattn.schedule import Direction

LIBRARY = ("fa4", "fa3", "cudnn", "flash", "cpu_flash")
BAND = "triton"
FIGURES = 6  # digits that a shipped figure keeps
Key = tuple[Case, Direction, str]


def case_of(record: Record) -> Case:
    """The case of a record."""
    c = record.config
    return Case(c["mask"], c["seq_len"], tuple(c["heads"]), tuple(c["head_dim"]), c["dtype"])


@dataclass(frozen=True)
class Results:
    """The latest record of each case, direction and kernel of one architecture."""

    architecture: str
    records: Mapping[Key, Record]

    @property
    def cases(self) -> list[Case]:
        """All cases, in the order in which they were measured."""
        return list(dict.fromkeys(case for case, _, _ in self.records))

    @property
    def kernels(self) -> list[str]:
        """All kernels that have a figure."""
        return list(dict.fromkeys(k for (_, _, k), r in self.records.items() if r.status == "ok"))

    def rate(self, case: Case, direction: Direction, kernel: str) -> float | None:
        """TFLOP/s, or None where there is no figure."""
        record = self.records.get((case, direction, kernel))
        return record.value if record is not None else None

    def rates(self, case: Case, direction: Direction) -> dict[str, float]:
        """TFLOP/s of all kernels that have a figure."""
        found = {kernel: self.rate(case, direction, kernel) for kernel in self.kernels}
        return {kernel: rate for kernel, rate in found.items() if rate is not None}

    def best(self, case: Case, direction: Direction, kernels: Iterable[str]) -> str | None:
        """The fastest of some kernels."""
        rates = self.rates(case, direction)
        return max((k for k in kernels if k in rates), key=rates.__getitem__, default=None)

    def chosen(self, case: Case, direction: Direction) -> str | None:
        """What "auto" chooses among the measured kernels, by the shipped table."""
        rates = self.rates(case, direction)
        if not rates:
            return None
        work = self.records[case, direction, next(iter(rates))].config["work"]
        order = kernel_order(
            device="cuda" if self.architecture.startswith("sm_") else self.architecture,
            dtype=getattr(torch, case.dtype), work=Work(**work), architecture=self.architecture,
        )  # fmt: skip
        return next((name for name in order if name in rates), None)

    def errors(self, case: Case, direction: Direction, kernel: str) -> Mapping[str, float]:
        """Relative errors by output, {} where there is no figure."""
        record = self.records.get((case, direction, kernel))
        return record.config.get("errors", {}) if record and record.status == "ok" else {}


def read_results(path: Path) -> list[Results]:
    """The results of a file, by architecture."""
    found: dict[str, dict[Key, Record]] = {}
    for record in read_records(path):
        own = found.setdefault(record.config["architecture"], {})
        key = (case_of(record), record.config["direction"], record.config["kernel"])
        own.pop(key, None)
        own[key] = record
    return [Results(architecture, records) for architecture, records in found.items()]


def without_figure(path: Path) -> set[str]:
    """Names of the cases whose latest record is a refusal or an error."""
    latest = {r.case: r.status for r in read_records(path)}
    return {case for case, status in latest.items() if status != "ok"}


def table_rows(path: Path) -> list[Row]:
    """The medians of a file as rows of the table that kernels are chosen by."""
    rows: dict[tuple[str, str, Work], dict[str, float]] = {}
    for results in read_results(path):
        for (case, _, kernel), record in results.records.items():
            if record.status == "ok" and record.value is not None:
                work = record.config["work"]
                short = {name: _short(v) for name, v in work.items() if isinstance(v, float)}
                key = (results.architecture, case.dtype, Work(**{**work, **short}))
                rows.setdefault(key, {})[kernel] = _short(record.value)
    return [Row(*key, tflops) for key, tflops in rows.items()]


def _short(value: float) -> float:
    return float(f"{value:.{FIGURES}g}")

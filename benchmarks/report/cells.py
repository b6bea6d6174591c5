"""A record as a cell of a suite: the fields that the report sorts and groups by.

Suites of ``ringattn bench`` are named ``bench.<suite>`` and share the keys of their configs. The
scripts of this folder have older ones, which `ringattn.benchmarks.report.older` translates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringattn.benchmarks.record import Record

SUITES = ("kernels", "methods", "masks", "train", "scaling", "simulated")
OWN = "ringattn"
ERRORS = ("error_out", "error_lse", "error_dq", "error_dk", "error_dv")

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One record, read.

    Attributes:
        suite: one of `SUITES`, or the record's name where it belongs to none.
        record: where it comes from.
        config: the record's, or what stands for it in an older file, with the keys of the suites.
        figures: the same of the record's figures.
    """

    suite: str
    record: Record
    config: Mapping[str, Any]
    figures: Mapping[str, float | None]

    @property
    def mask(self) -> str:
        return self.text("mask") or self.record.case

    @property
    def contender(self) -> str:
        return self.text("contender") or OWN

    @property
    def ranks(self) -> int:
        """Ranks, or GPUs, of the run."""
        return self.whole("ranks") or self.whole("gpus") or 1

    @property
    def direction(self) -> str:
        return self.text("direction") or "both"

    @property
    def simulated(self) -> bool:
        return self.config.get("simulated") is True

    @property
    def ok(self) -> bool:
        return self.record.status == "ok"

    @property
    def device(self) -> str:
        """Where it ran: "simulated", a GPU's name, or the CPU's."""
        if self.simulated:
            cluster = self.text("cluster")
            return f"simulated {cluster}".strip()
        hardware = self.record.hardware
        if hardware.get("gpu") and not self.text("device").startswith("cpu"):
            return str(hardware["gpu"])
        return f"CPU {hardware.get('cpu') or ''}".strip()

    @property
    def worst_error(self) -> tuple[str, float] | None:
        """The largest relative error and whose it is; None where none was measured."""
        found = [(name[6:], self.figures.get(name)) for name in ERRORS]
        return max(
            ((name, value) for name, value in found if value is not None),
            key=lambda pair: pair[1],
            default=None,
        )

    def text(self, key: str) -> str:
        """A value of the config as text; empty where there is none. A dtype by torch's name."""
        value = self.config.get(key)
        text = "" if value is None else str(value)
        return _DTYPES.get(text, text) if key == "dtype" else text

    def whole(self, key: str) -> int:
        """A value of the config as a whole number; 0 where there is none."""
        value: Any = self.config.get(key)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return int(value) if plain and abs(value) < 1e18 else 0

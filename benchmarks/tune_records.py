"""Records of the block-size search: which were tried, which is best."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ringattn.benchmarks.record import Record, Recorder, read_records
from ringattn.benchmarks.tune_cases import Entry, as_text
from ringattn.kernels import triton_configs
from ringattn.kernels.triton_configs import BlockConfig

NAME, UNIT = "triton_tune", "TFLOP/s"
GAIN = 1.01  # what another configuration must gain over the shipped one, beyond noise
ENTRY = ("part", "head_dim", "itemsize", "softcap", "listed")
_DEVICE_CODE = ("triton_forward.py", "triton_backward.py", "triton_parts.py")


def source_hash() -> str:
    """Names the device code and Triton's version; what was measured with others is left aside."""
    folder = Path(triton_configs.__file__).parent
    text = b"".join((folder / name).read_bytes() for name in _DEVICE_CODE)
    return hashlib.sha256(text + version("triton").encode()).hexdigest()[:8]


class Log:
    """The records of one architecture and device code, and what is added to them."""

    def __init__(self, path: Path, arch: str) -> None:
        self.path, self.arch, self.sources = path, arch, source_hash()
        self.recorder = Recorder(path)
        self.marker = path.with_suffix(".running")
        self._blame_interrupted()

    def case(self, entry: Entry, config: BlockConfig) -> str:
        """The name of a record."""
        return f"{self.arch}-{entry}-{as_text(config)}-{self.sources}"

    def has(self, entry: Entry, config: BlockConfig) -> bool:
        """Whether the configuration was tried."""
        return self.recorder.has(NAME, self.case(entry, config))

    def begin(self, entry: Entry, config: BlockConfig) -> None:
        """Notes what runs now, in case the process ends in it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = [self.case(entry, config), self._about(entry, config)]
        self.marker.write_text(json.dumps(about), encoding="utf-8")

    def done(self) -> None:
        """What ran has ended."""
        self.marker.unlink(missing_ok=True)

    def rated(self, entry: Entry, config: BlockConfig, rates: Mapping[str, float]) -> float:
        """Records the geometric mean of TFLOP/s over masks, and returns it."""
        value = geometric_mean(rates.values())
        about = {**self._about(entry, config), "rates": dict(rates)}
        self.recorder.ok(NAME, self.case(entry, config), value, UNIT, config=about)
        return value

    def left_out(self, entry: Entry, config: BlockConfig, status: str, reason: str) -> None:
        """Records why a configuration has no figure: "refused" or "error"."""
        record = getattr(self.recorder, status)
        record(NAME, self.case(entry, config), UNIT, reason, config=self._about(entry, config))

    def figures(self) -> dict[Entry, dict[BlockConfig, float]]:
        """TFLOP/s of all configurations that have a figure."""
        found: dict[Entry, dict[BlockConfig, float]] = {}
        for record in read_records(self.path):
            if _is_of(record, self.arch, self.sources):
                c = record.config
                entry = Entry(*(c[name] for name in ENTRY))
                assert record.value is not None, "records with status ok have a value"
                found.setdefault(entry, {})[BlockConfig(*c["blocks"])] = record.value
        return found

    def _about(self, entry: Entry, config: BlockConfig) -> dict:
        return {
            "part": entry.part,
            "head_dim": entry.head_dim,
            "itemsize": entry.itemsize,
            "softcap": entry.softcap,
            "listed": entry.listed,
            "blocks": list(astuple(config)),
            "architecture": self.arch,
            "sources": self.sources,
        }

    def _blame_interrupted(self) -> None:
        if self.marker.exists():
            case, about = json.loads(self.marker.read_text(encoding="utf-8"))
            if not self.recorder.has(NAME, case):
                reason = "the process ended while this ran"
                self.recorder.error(NAME, case, UNIT, reason, config=about)
            self.marker.unlink()


def _is_of(record: Record, arch: str, sources: str) -> bool:
    c = record.config
    return (
        record.name == NAME
        and record.status == "ok"
        and (c["architecture"], c["sources"]) == (arch, sources)
    )


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(list(values)))))


def choose(figures: Mapping[BlockConfig, float], now: BlockConfig) -> BlockConfig:
    """The fastest; the shipped one where no other gains `GAIN` over it."""
    best = max(figures, key=figures.__getitem__)
    return now if now in figures and figures[best] < GAIN * figures[now] else best

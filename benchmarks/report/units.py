"""Numbers as people read them: three digits that count, units of a fitting size."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = {
    "TFLOP/s": ((1e3, "PFLOP/s"), (1.0, "TFLOP/s"), (1e-3, "GFLOP/s"), (1e-6, "MFLOP/s")),
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "ms": ((1e3, "s"), (1.0, "ms"), (1e-3, "µs")),
    "bytes": ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "share": ((1e-2, "%"),),
    "MFU": ((1e-2, "% MFU"),),
    "percent": ((1.0, "%"),),
}
_LESS_IS_BETTER = ("s", "ms", "us", "µs", "bytes", "relative error", "error")


@dataclass(frozen=True)
class Scale:
    """What to divide the values of a column or an axis by, and the unit that they have then."""

    divisor: float
    unit: str

    def text(self, value: float | None) -> str:
        """The value in this unit; a dash where there is none."""
        return "–" if value is None else number(value / self.divisor)

    def with_unit(self, value: float | None) -> str:
        """The value and its unit."""
        return "–" if value is None else f"{self.text(value)} {self.unit}".rstrip()


def scale_of(values: Iterable[float | None], unit: str) -> Scale:
    """The scale that suits most of the values (their upper middle); `unit` is a record's."""
    steps = _STEPS.get(unit)
    if steps is None:
        return Scale(1.0, unit)
    sizes = sorted(abs(value) for value in values if value)
    typical = sizes[(3 * len(sizes)) // 4] if sizes else steps[-1][0]
    for divisor, name in steps:
        if typical >= 0.9995 * divisor:
            return Scale(divisor, name)
    return Scale(*steps[-1])


def number(value: float) -> str:
    """Three significant digits with separators; exponents for the very large and small."""
    size = abs(value)
    if size == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if size >= 1e7 or size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:,.{digits}f}".replace("-", "−")


def short(value: float) -> str:
    """A round number, such as a tick of an axis, without zeros that say nothing."""
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{round(value, 9):,.10g}".replace("-", "−")


def count(value: float) -> str:
    """A whole number with separators."""
    return f"{value:,.0f}"


def counted(value: int, word: str) -> str:
    """A number of things: "1 case", "2 cases"."""
    return f"{value:,} {word}{'s' * (value != 1)}"


def tokens(value: int) -> str:
    """A sequence length: 128K, 1M, or the number itself."""
    for size, suffix in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size and value % size == 0:
            return f"{value // size:,}{suffix}"
    return f"{value:,}"


def less_is_better(unit: str) -> bool:
    """Whether a smaller figure of this unit is the better one."""
    return unit in _LESS_IS_BETTER

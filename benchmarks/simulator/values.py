"""Published figures: a cell of text and its unit as a number in SI units."""

import re

TIMES = {
    "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0,
    "minutes": 60.0, "h": 3600.0, "hours": 3600.0,
}  # fmt: skip
BYTES = {
    "gb": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20, "tb": 1e12, "tib": 2**40, "b": 1.0,
    "bytes": 1.0,
}  # fmt: skip
FLOPS = {"tflop": 1.0, "pflop": 1e3, "gflop": 1e-3}
LEAST, MOST = 1e-18, 1e18
"""Figures outside cannot be, whatever they measure."""
LONGEST = 2**40
"""Tokens of a sequence."""
_OOM = re.compile(r"oom|out.of.memory|fail|^x$|true|^1$")
_RAN = re.compile(r"^(ok|fits?|runs?|ran|pass(ed)?|no|false|0|trains?)$")
_RATE = re.compile(r"((it|iter|iteration|call|step)s?|1)/s(ec|econd)?|hz")
_TOKENS = frozenset(
    ("", "1", "tgs", "tok", "token", "tokens", "s", "sec", "second", "gpu", "rank", "device")
)
_SHARES = ("", "share", "fraction", "ratio", "mfu", "hfu", "1")


def unit_name(unit: str) -> str:
    """The first word of a unit in lower case: "ms" of "ms/step"."""
    return re.split(r"[/\s]", unit.strip().lower())[0]


def is_timed(metric: str, unit: str) -> bool:
    """Whether a figure of attention is a time, not a rate."""
    return "time" in metric or unit_name(unit) in TIMES


def read_value(text: str, unit: str, kind: str, metric: str) -> float:
    """A figure in SI units; see `Published.value`.

    Raises:
        ValueError: it cannot be read or cannot be; the message says why.
    """
    plain = text.strip().lower()
    if not plain:
        raise ValueError("value is empty")
    if kind == "verdict":
        if _RAN.search(plain):
            return 0.0
        if _OOM.search(plain):
            return 1.0
        raise ValueError(f"value {text!r} is no verdict")
    try:
        number = float(plain.replace(",", "").rstrip("%"))
    except ValueError:
        raise ValueError(f"value {text!r} is no number") from None
    if kind == "mfu" and ("%" in text or number > 1.5) and unit.strip().lower() in _SHARES:
        unit = "%"  # a percentage whose unit does not say so
    value = number * _factor(unit, kind, metric)
    if not LEAST < value < (LONGEST + 1 if kind == "length" else MOST):
        raise ValueError(f"value {text!r} cannot be")
    return value


def _factor(unit: str, kind: str, metric: str) -> float:
    """What a number in a unit is multiplied by; an empty unit is GiB or the SI unit."""
    plain, name = unit.strip().lower(), unit_name(unit)
    factor: float | None = None
    if kind == "memory":
        factor = BYTES.get(name or "gib")
    elif kind == "mfu" and plain.startswith(("%", "percent")):
        factor = 0.01
    elif kind == "mfu" and plain in _SHARES:
        factor = 1.0
    elif kind == "seconds" or (kind == "attention" and is_timed(metric, unit)):
        factor = TIMES.get(name or "s")
    elif kind in ("attention", "flops"):
        factor = next((f for n, f in FLOPS.items() if name.startswith(n)), None)
        if not name or (kind == "attention" and _RATE.fullmatch(plain)):
            factor = 1.0
    elif kind == "tokens" and name not in TIMES:
        factor = 1.0 if set(re.split(r"[/\s]+|\bper\b", plain)) <= _TOKENS else None
    elif kind == "length" and name in ("", "tok", "token", "tokens"):
        factor = 1.0
    if factor is None:
        raise ValueError(f"unit {unit!r} is unknown")
    return factor

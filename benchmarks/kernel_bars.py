"""What the kernels are held to, and published figures to set beside them.

A bar is judged on the bfloat16, 64:8, head dim 128 cases of a file: ratios of TFLOP/s or errors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ringattn.benchmarks.kernel_cases import Case
from ringattn.benchmarks.kernel_measure import DIRECTIONS
from ringattn.benchmarks.kernel_results import BAND, LIBRARY, Results
from ringattn.schedule import Direction

FLEX = "flex"
DENSE = ("full", "causal")  # whose rate a kernel is held to, the first that is measured
MOST_ERROR = 1.1
# (mask, least share of the own dense rate, forward and backward; least ratio to FlexAttention)
SHARES = (
    *(
        (mask, (0.85, 0.75), 1.3)
        for mask in (
            "documents_causal_4k", "shared_question_4k", "causal_blockwise_4k", "prefix_lm",
            "block_causal_documents",
        )
    ),
    ("window_causal", (0.65, 0.50), 1.3),
    ("blocks_uniform", (0.75, 0.75), 1.2),
    ("blocks_variable", (0.75, 0.75), 1.2),
)  # fmt: skip
# Published for one H100, 32K tokens, 64:8 heads, head dim 128, bfloat16; forward, backward.
PUBLISHED = (
    ("causal", "FA3", 678, 585),
    ("causal", "FFA (MagiAttention)", 622, 560),
    ("causal", "FlexAttention", 392, 272),
    ("documents_causal", "FA3", 583, 426),
    ("documents_causal", "FFA (MagiAttention)", 547, 420),
    ("window_causal", "FA3", 524, 332),
    ("window_causal", "FFA (MagiAttention)", 453, 310),
    ("window_causal", "cuDNN", 394, 282),
)
PUBLISHED_ON = "sm_90"


@dataclass(frozen=True)
class Verdict:
    """One figure held against its bar. `value` is None where something is not measured."""

    what: str
    case: str
    direction: str
    value: float | None
    bar: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar is met, None where it cannot be said."""
        if self.value is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def verdicts(results: Results) -> list[Verdict]:
    """All bars on one architecture's results."""
    return [*_libraries(results), *_choices(results), *_shares(results), *_accuracy(results)]


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _libraries(results: Results) -> Iterator[Verdict]:
    """The band kernel against the best library kernel where that is at its best."""
    for mask in DENSE:
        for seq_len in (32768, 65536, 131072):
            case = Case(mask, seq_len)
            for direction, bar in zip(DIRECTIONS, (0.80, 0.65)):
                best = results.best(case, direction, LIBRARY)
                rate = results.rate(case, direction, best) if best else None
                value = _ratio(results.rate(case, direction, BAND), rate)
                yield Verdict(f"{BAND} / {best or 'library'}", str(case), direction, value, bar)


def _choices(results: Results) -> Iterator[Verdict]:
    """What "auto" takes against the fastest, on all cases of 32K tokens and more."""
    for direction in DIRECTIONS:
        worst: tuple[float | None, str] = (None, "all cases of 32K tokens and more")
        for case in results.cases:
            rates = results.rates(case, direction)
            chosen = results.chosen(case, direction)
            if case.seq_len >= 32768 and len(rates) > 1 and chosen is not None:
                value = rates[chosen] / max(rates.values())
                if worst[0] is None or value < worst[0]:
                    worst = (value, str(case))
        yield Verdict("auto's choice / fastest, worst", worst[1], direction, worst[0], 0.98)


def _shares(results: Results) -> Iterator[Verdict]:
    """Irregular masks against the kernel's own dense rate, and against FlexAttention."""
    for mask, shares, over_flex in SHARES:
        case = Case(mask, 32768)
        for direction, bar in zip(DIRECTIONS, shares):
            rate = results.rate(case, direction, BAND)
            dense = _dense(results, case, direction)
            yield Verdict(
                f"{BAND} / its dense rate", str(case), direction, _ratio(rate, dense), bar
            )
            other = _ratio(rate, results.rate(case, direction, FLEX))
            yield Verdict(f"{BAND} / {FLEX}", str(case), direction, other, over_flex)


def _dense(results: Results, case: Case, direction: Direction) -> float | None:
    rates = (results.rate(Case(mask, case.seq_len), direction, BAND) for mask in DENSE)
    return next((rate for rate in rates if rate is not None), None)


def _accuracy(results: Results) -> Iterator[Verdict]:
    """The worst ratio of the band kernel's error to the library's, by output."""
    worst: dict[str, tuple[float | None, str]] = {}
    for direction, names in zip(DIRECTIONS, (("out",), ("dq", "dk", "dv"))):
        for name in names:
            worst[name] = (None, "all cases")
            for case in results.cases:
                value = error_ratio(results, case, direction, BAND, name)
                if value is not None and value > (worst[name][0] or 0.0):
                    worst[name] = (value, str(case))
    for name, (value, case) in worst.items():
        direction = "forward" if name == "out" else "backward"
        what = f"error of {name}: {BAND} / library, worst"
        yield Verdict(what, case, direction, value, MOST_ERROR, at_most=True)


def error_ratio(
    results: Results, case: Case, direction: Direction, kernel: str, name: str
) -> float | None:
    """A kernel's error over that of the first library kernel that has one; None without."""
    library = (results.errors(case, direction, k).get(name) for k in LIBRARY if k != kernel)
    theirs = next((error for error in library if error is not None), None)
    return _ratio(results.errors(case, direction, kernel).get(name), theirs)

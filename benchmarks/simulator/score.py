"""Scores predictions against published rows: errors, ranking, choices, verdicts."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ringattn.benchmarks.simulator.assumptions import assumptions
from ringattn.benchmarks.simulator.mask_names import group_named
from ringattn.benchmarks.simulator.predict import is_time
from ringattn.benchmarks.simulator.records import Published
from ringattn.benchmarks.simulator.tables import same_hardware

APART, NEAR, FAR = 0.05, 0.05, 0.10
GROUPS = {
    "tokens": "end to end: tokens/s", "seconds": "end to end: time", "flops": "end to end: TFLOP/s",
    "mfu": "end to end: MFU", "memory": "memory", "length": "longest sequence",
    "verdict": "out of memory", "unknown": "unknown metric",
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """A row with what was predicted for it.

    Attributes:
        value: in the row's unit in SI; for verdicts bytes over the limit. None is a miss.
        reason: why there is none.
    """

    row: Published
    value: float | None
    reason: str = ""

    @property
    def error(self) -> float | None:
        """Predicted over published, less one; None without either."""
        if self.value is None or not self.row.value or self.row.kind == "verdict":
            return None
        return self.value / self.row.value - 1


def group_of(row: Published) -> str:
    """What a row is reported under."""
    if row.kind == "attention":
        return f"attention: {group_named(row.mask)}"
    return GROUPS[row.kind]


def score(found: Sequence[Scored]) -> dict[str, Any]:
    """All figures of the report, as JSON takes them.

    `groups` maps a group to rows, predicted, coverage, median, p90 and bias; `ranking` to pairs and
    choices; `verdicts` to shares of verdicts that are right; `misses` lists rows and reasons.
    `unreadable` lists rows whose figure cannot be read or cannot be; nothing else counts them.
    `assumed` lists what stands for names that nobody knows; see `assumptions`.
    """
    unreadable = [s.row for s in found if s.row.unreadable]
    found = [s for s in found if not s.row.unreadable]
    kinds: dict[str, list[Scored]] = defaultdict(list)
    for one in found:
        kinds[group_of(one.row)].append(one)
    speeds = [s for s in found if s.row.kind not in ("verdict", "memory", "length", "unknown")]
    steps = [s for s in speeds if s.row.kind != "attention"]
    if len({s.row.kind for s in steps}) > 1:
        kinds["end to end: all"] = steps
    return {
        "groups": {name: _errors(mine) for name, mine in sorted(kinds.items())},
        "ranking": _rankings(speeds),
        "verdicts": _verdicts(found),
        "misses": _listed([(s.row, s.reason) for s in found if s.value is None]),
        "unreadable": _listed([(row, row.unreadable) for row in unreadable]),
        "assumed": _assumed(found),
    }


def _listed(found: Iterable[tuple[Published, str]]) -> list[dict[str, Any]]:
    """Rows and reasons, each once: a step that was timed is held against its verdict too."""
    known = dict.fromkeys((row.line, row.metric, reason) for row, reason in found)
    return [{"line": line, "metric": metric, "reason": why} for line, metric, why in known]


def _assumed(found: Iterable[Scored]) -> list[dict[str, Any]]:
    lines = {s.row.line: assumptions(s.row) for s in found}
    return [{"line": line, "assumed": list(told)} for line, told in lines.items() if told]


def _errors(found: Sequence[Scored]) -> dict[str, Any]:
    errors = np.array([s.error for s in found if s.error is not None])
    told = sum(s.value is not None for s in found)
    result: dict[str, Any] = {
        "rows": len(found), "predicted": told, "coverage": told / len(found),
    }  # fmt: skip
    if len(errors):
        size = np.abs(errors)
        result |= {
            "median": float(np.median(size)),
            "p90": float(np.quantile(size, 0.9)),
            "bias": float(np.median(errors)),
        }
    return result


def _setting(row: Published) -> tuple:
    """What rows share that differ only in method, and in how ranks are split between methods."""
    return (
        row.source, same_hardware(row.hardware), row.gpus, row.model, row.heads, row.seq_len,
        row.mask, row.metric, row.unit, row.dtype.lower(),
    )  # fmt: skip


def _strict(row: Published) -> tuple:
    return (*_setting(row), row.checkpointing, row.cp, row.tp)


def _rankings(found: Sequence[Scored]) -> dict[str, Any]:
    """Pairs and choices: of all attention, of all training steps, and together.

    "differ only in method" compares rows alike in everything else; "same setting" lets
    checkpointing and the split of ranks differ too, as a user's choice would.
    """
    parts: dict[str, Iterable[Scored]] = {
        "attention": [s for s in found if s.row.kind == "attention"],
        "end to end": [s for s in found if s.row.kind != "attention"],
        "all": found,
    }
    result: dict[str, Any] = {}
    for name, mine in parts.items():
        for label, key in (("differ only in method", _strict), ("same setting", _setting)):
            figures = _ranking(mine, key)
            if figures["pairs"] or figures["choices"]:
                result[f"{name}, {label}"] = figures
    return result


def _ranking(found: Iterable[Scored], key: Callable[[Published], Hashable]) -> dict[str, Any]:
    groups: dict[Hashable, list[tuple[float, float, str]]] = defaultdict(list)
    for one in found:
        if one.value is not None and one.row.value:
            sign = -1.0 if is_time(one.row) else 1.0
            groups[key(one.row)].append((one.row.value**sign, one.value**sign, one.row.method))
    pairs = right = choices = near = 0
    regrets = []
    for members in groups.values():
        for a, b in combinations(members, 2):
            if max(a[0], b[0]) > (1 + APART) * min(a[0], b[0]):
                pairs += 1
                right += (a[0] > b[0]) == (a[1] > b[1])
        if len({method for _, _, method in members}) > 1:
            choices += 1
            chosen, best = max(members, key=lambda m: m[1])[0], max(m[0] for m in members)
            near += chosen >= (1 - NEAR) * best
            regrets.append(1 - chosen / best)
    return {
        "pairs": pairs, "ranked_right": right / pairs if pairs else None,
        "choices": choices, "near_best": near / choices if choices else None,
        "mean_regret": float(np.mean(regrets)) if regrets else None,
    }  # fmt: skip


def _verdicts(found: Sequence[Scored]) -> dict[str, Any]:
    """Shares of verdicts that are right: the table's own, and steps that were timed and so fit."""
    parts: dict[str, list[Scored]] = {
        "out of memory": [s for s in found if s.row.kind == "verdict" and s.row.value == 1],
        "fits": [s for s in found if s.row.kind == "verdict" and s.row.value == 0],
    }
    parts["all"] = parts["out of memory"] + parts["fits"]
    result = {}
    for name, mine in parts.items():
        right = [s.value is not None and (s.value > 1) == bool(s.row.value) for s in mine]
        far = [s.value is not None and abs(s.value - 1) > FAR for s in mine]
        clear = [r for r, f in zip(right, far, strict=True) if f]
        result[name] = {
            "rows": len(mine), "right": float(np.mean(right)) if right else None,
            "far_rows": len(clear), "far_right": float(np.mean(clear)) if clear else None,
        }  # fmt: skip
    return result

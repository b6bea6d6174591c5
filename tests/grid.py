"""The full product of cases: resumable, and summarised in files that are committed.

    summary = run_grid("attention", cases, check, tolerance=1e-12)

``check(case)`` returns relative errors by tensor name, or raises UserError where the product
contains what the library refuses. Each result is appended to ``tests/results/<name>.jsonl`` with
the digest of the sources it was made with; a rerun on the same sources skips what passed and
repeats what failed. The summary of every grid stands in ``summary.json`` and ``summary.md``.
"""

import hashlib
import json
import math
import platform
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ringattn.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
ATTENTION_SOURCES = ("ringattn", "kernels", "parallel")
MAX_REPORTED = 20

Case = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case's outcome: ``ok``, ``refused`` (with the reason) or ``failed`` (with why)."""

    case: str
    values: Case
    digest: str
    status: str
    errors: dict[str, float]
    message: str = ""


def case_id(case: Case) -> str:
    """Readable key of a case: ``mask=causal,layout=zigzag,world=2``."""
    return ",".join(f"{name}={value}" for name, value in case.items())


def source_digest(folders: Iterable[str] = ATTENTION_SOURCES, root: Path = ROOT) -> str:
    """Digest of the Python files in the folders, symbolic links not followed."""
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_grid(
    name: str,
    cases: Iterable[Case],
    check: Callable[[Case], dict[str, float]],
    *,
    tolerance: float,
    folders: Iterable[str] = ATTENTION_SOURCES,
    axes: tuple[str, ...] = ("mask", "method", "layout"),
    results: Path = RESULTS,
    seconds: float | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Runs the cases not yet run on these sources, writes the summary and returns it.

    Args:
        check: errors by tensor name; each must be at most ``tolerance`` and not NaN.
        folders: the sources that the results depend on.
        axes: the summary counts outcomes by each value of these axes.
        seconds: no case starts later than this; the summary then counts what was not run, and a
            rerun goes on there. None runs everything.
        note: what the summary says about the cases, such as that they are a sample.

    Raises AssertionError, after all cases, naming the failed ones.
    """
    digest = source_digest(folders)
    results.mkdir(parents=True, exist_ok=True)
    journal = results / f"{name}.jsonl"
    done = {r.case: r for r in _read(journal) if r.digest == digest and r.status != "failed"}
    outcome: dict[str, Result] = {}
    not_run, end = 0, math.inf if seconds is None else time.monotonic() + seconds
    with journal.open("a", encoding="utf-8") as file:
        _end_torn_line(journal, file)
        for case in cases:
            key = case_id(case)
            if key not in done and time.monotonic() > end:
                not_run += 1
                continue
            if key not in done:
                done[key] = _run_case(case, check, tolerance, digest)
                file.write(json.dumps(asdict(done[key]), default=str) + "\n")
                file.flush()
            outcome[key] = done[key]
    summary = _summarise(list(outcome.values()), tolerance, digest, axes)
    summary["total"]["not_run"] = not_run
    if note:
        summary["note"] = note
    write_summary(name, summary, results)
    failed = [result for result in outcome.values() if result.status == "failed"]
    lines = [f"{r.case}: {r.message.strip().splitlines()[-1]}" for r in failed[:MAX_REPORTED]]
    if failed:
        lines.insert(0, f"{name}: {len(failed)} of {len(outcome)} cases failed")
        raise AssertionError("\n  ".join(lines))
    return summary


def write_summary(name: str, summary: dict[str, Any], results: Path = RESULTS) -> None:
    """Replaces the grid's entry in ``summary.json`` and writes ``summary.md`` from all of them."""
    path = results / "summary.json"
    grids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    grids[name] = summary
    grids = dict(sorted(grids.items()))
    path.write_text(json.dumps(grids, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(_markdown(*item) for item in grids.items())
    (results / "summary.md").write_text(f"# Full grid\n\n{text}", encoding="utf-8")


def _run_case(
    case: Case, check: Callable[[Case], dict[str, float]], tolerance: float, digest: str
) -> Result:
    errors: dict[str, float] = {}
    try:
        errors = {name: float(error) for name, error in check(case).items()}
        bad = {n: e for n, e in errors.items() if math.isnan(e) or e > tolerance}
        status = "failed" if bad else "ok"
        message = ", ".join(f"{n} {e:.3e} > {tolerance:.1e}" for n, e in bad.items())
    except UserError as error:
        status, message = "refused", str(error)
    except Exception:
        status, message = "failed", traceback.format_exc()
    return Result(
        case=case_id(case),
        values=case,
        digest=digest,
        status=status,
        errors=errors,
        message=message,
    )


def _read(journal: Path) -> list[Result]:
    """The journal's results; a line torn by a kill is left out."""
    results = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            results.append(Result(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return results


def _end_torn_line(journal: Path, file: Any) -> None:
    if journal.stat().st_size and not journal.read_bytes().endswith(b"\n"):
        file.write("\n")


def _summarise(
    results: list[Result], tolerance: float, digest: str, axes: tuple[str, ...]
) -> dict[str, Any]:
    by_axis = {
        axis: {
            value: _counts([r for r in results if str(r.values[axis]) == value])
            for value in sorted({str(r.values[axis]) for r in results if axis in r.values})
        }
        for axis in axes
        if any(axis in r.values for r in results)
    }
    return {
        "total": _counts(results),
        "tolerance": tolerance,
        "sources": digest,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "by": by_axis,
        "refusals": sorted({r.message for r in results if r.status == "refused"}),
    }


def _counts(results: list[Result]) -> dict[str, Any]:
    counts: dict[str, Any] = {
        status: sum(r.status == status for r in results) for status in ("ok", "refused", "failed")
    }
    errors = [error for r in results if r.status == "ok" for error in r.errors.values()]
    return counts | {"max_error": max(errors, default=None)}


def _markdown(name: str, summary: dict[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in summary["versions"].items())
    lines = [
        f"## {name}",
        "",
        *([summary["note"], ""] if "note" in summary else []),
        f"Largest relative error allowed: {summary['tolerance']:.0e}. "
        f"Sources {summary['sources']}, {versions}. "
        f"Cases not run yet: {summary['total'].get('not_run', 0)}.",
        "",
        "| | ok | refused | failed | largest error |",
        "|---|---|---|---|---|",
        _row("**all**", summary["total"]),
    ]
    for axis, values in summary["by"].items():
        lines += [_row(f"{axis} {value}", counts) for value, counts in values.items()]
    if summary["refusals"]:
        lines += ["", "Refused:", "", *(f"- {reason}" for reason in summary["refusals"])]
    return "\n".join([*lines, ""])


def _row(title: str, counts: dict[str, Any]) -> str:
    error = counts["max_error"]
    shown = "" if error is None else f"{error:.1e}"
    return f"| {title} | {counts['ok']} | {counts['refused']} | {counts['failed']} | {shown} |"

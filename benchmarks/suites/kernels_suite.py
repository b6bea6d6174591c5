"""``ringattn bench kernels``: every local kernel on every mask, by itself on one device.

Kernels are measured as by ``python -m ringattn.benchmarks.kernels`` (`kernel_measure`), in one
process, so that one that hangs or dies costs its case alone. On the CPU times are CPU seconds.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.suites.cells import DIRECTIONS, OURS, Problem, problems
from ringattn.benchmarks.suites.mask_cases import expanded
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.ranks import AskedRanks, RanksError
from ringattn.benchmarks.suites.settings import Settings
from ringattn.kernels.select import kernel_names

NAME, UNIT = "bench.kernels", "TFLOP/s"


def run(settings: Settings, recorder: Recorder, show: Progress, ranks: AskedRanks) -> None:
    """Masks × lengths × packs × heads × head dims × dtypes × kernels.

    Raises RanksError when a launcher's ranks are lost.
    """
    todo = [
        (problem, kernel)
        for problem in _problems(settings)
        for kernel in _kernels(settings)
        if not all(recorder.has(NAME, _case(problem, kernel, d, ranks.device)) for d in DIRECTIONS)
    ]
    show.expect(len(todo))
    world = 1 if ranks.worlds is None else ranks.worlds[0]
    for problem, kernel in todo:
        show(f"{problem.mask}: kernel {kernel}")
        request = {
            "do": "kernel", "problem": asdict(problem), "kernel": kernel,
            "seconds": settings.kernels.seconds, "whole": settings.common.reference,
        }  # fmt: skip
        try:
            found = ranks.ask(world, request)[0]
        except RanksError as error:
            found = {d: {"status": "error", "reason": str(error)} for d in DIRECTIONS[:2]}
            _record(settings, recorder, problem, kernel, ranks.device, found)
            if error.fatal:
                raise
        else:
            _record(settings, recorder, problem, kernel, ranks.device, found)
        show.advance()


def _problems(settings: Settings) -> Iterator[Problem]:
    common, wanted = settings.common, settings.kernels
    masks = expanded(common.masks if wanted.masks is None else wanted.masks)
    for heads in wanted.heads:
        for head_dim in wanted.head_dim:
            for dtype in wanted.dtype:
                shape = replace(common, heads=heads, head_dim=head_dim, dtype=dtype)
                yield from problems(shape, wanted.seq_len, masks)


def _kernels(settings: Settings) -> tuple[str, ...]:
    names = settings.kernels.kernels
    return kernel_names() if "all" in names else names


def _case(problem: Problem, kernel: str, direction: str, device: str) -> str:
    return f"{problem.name}-{kernel}-{direction}-{device}"


def _record(
    settings: Settings,
    recorder: Recorder,
    problem: Problem,
    kernel: str,
    device: str,
    found: dict[str, dict[str, Any]],
) -> None:
    command = settings.command("kernels", f"--masks {problem.mask}", f"kernels.kernels=[{kernel}]")
    for direction in DIRECTIONS:
        case = _case(problem, kernel, direction, device)
        if recorder.has(NAME, case):
            continue
        config = problem.config() | {
            "suite": "kernels", "contender": OURS, "method": "", "layout": "", "ranks": 1,
            "ranks_per_node": 1, "direction": direction, "kernel": kernel, "device": device,
            "simulated": False, "command": command,
        }  # fmt: skip
        entry = found[direction] if direction in found else _both(problem, found)
        if entry["status"] != "ok":
            getattr(recorder, entry["status"])(NAME, case, UNIT, entry["reason"], config)
            continue
        figures = {
            "seconds": entry["seconds"],
            "cpu_seconds": entry["seconds"] if device == "cpu" else None,
            "tflops": entry["tflops"],
            "area": problem.area,
            "peak_bytes": float(entry["peak_bytes"]),
        } | {f"error_{name}": error for name, error in entry["errors"].items()}
        config["rounds"] = entry["repetitions"]
        recorder.ok(
            NAME, case, entry["tflops"], UNIT, spread=entry["spread"], config=config,
            figures=figures,
        )  # fmt: skip


def _both(problem: Problem, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both passes as one, from their medians."""
    parts = list(found.values())
    for part in parts:
        if part["status"] != "ok":
            return part
    seconds = sum(part["seconds"] for part in parts)
    return {
        "status": "ok",
        "seconds": seconds,
        "tflops": problem.flops("both") / seconds / 1e12,
        "spread": None,
        "peak_bytes": max(part["peak_bytes"] for part in parts),
        "errors": parts[0]["errors"] | parts[1]["errors"],
        "repetitions": min(part["repetitions"] for part in parts),
    }

"""Checks contenders against a float64 reference and times the right ones in interleaved rounds."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch

from ringattn.benchmarks.peer_ranks import (
    Checked,
    Forget,
    PoolError,
    Prepare,
    RankPool,
    Time,
    Timed,
    assemble,
)
from ringattn.benchmarks.peers import YARDSTICK
from ringattn.benchmarks.peers.base import Contender, Shape, Tensors
from ringattn.benchmarks.peers.cases import MaskCase

RESULTS = ("out", "dq", "dk", "dv")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Most relative 2-norm error of results by dtype; right ones stay below a third of it."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
TIMEOUT = 300.0  # seconds for one run of one contender


@dataclass
class Outcome:
    """What is known of a contender on one problem; `reason` says why it was not timed."""

    contender: Contender
    status: str = "ok"
    reason: str = ""
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    planned_bytes: int | None = None
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)

    def stop(self, status: str, reason: str) -> None:
        """Takes the contender out, with the reason."""
        self.status, self.reason = status, reason

    def add(self, ranks: list[Timed]) -> None:
        """One timed run."""
        self.cpu_s.append(sum(t.cpu_s for t in ranks))
        self.wall_s.append(max(t.wall_s for t in ranks))
        self.sent_bytes = [t.sent_bytes for t in ranks if t.sent_bytes is not None]
        if self.planned_bytes is not None and sum(self.sent_bytes) != self.planned_bytes:
            self.stop(
                "error", f"plan counts {self.planned_bytes} bytes, wire {sum(self.sent_bytes)}"
            )


class Pools:
    """Rank pools by world size, started when needed and again after one has died.

    A pool of one rank is the yardstick's; it has `yardstick_threads`.
    """

    def __init__(self, stack: ExitStack, yardstick_threads: int = 2, device: str = "cpu") -> None:
        self._stack, self._threads, self._device = stack, yardstick_threads, device
        self._pools: dict[int, RankPool] = {}
        self._prepared: set[tuple[int, str]] = set()

    def prepare(self, world: int, request: Prepare) -> list[Checked]:
        """Prepares a contender on every rank. Raises PoolError."""
        answers = self._ask(world, request)
        self._prepared.add((world, request.contender.name))
        return answers

    def time(self, world: int, request: Prepare) -> list[Timed]:
        """Times what `request` prepared; prepares it again if its ranks died since."""
        if (world, request.contender.name) not in self._prepared:
            self.prepare(world, request)
        return self._ask(world, Time(request.contender.name))

    def forget(self, world: int) -> None:
        """Drops what was prepared."""
        self._prepared = {key for key in self._prepared if key[0] != world}
        if world in self._pools:
            self._ask(world, Forget())

    def _ask(self, world: int, request: Prepare | Time | Forget) -> list:
        if world not in self._pools:
            threads = self._threads if world == 1 else 1
            self._pools[world] = self._stack.enter_context(RankPool(world, threads, self._device))
        try:
            return self._pools[world].ask(request, TIMEOUT)
        except PoolError:
            del self._pools[world]
            self._prepared = {key for key in self._prepared if key[0] != world}
            raise


def measure(
    case: MaskCase,
    world: int,
    shape: Shape,
    rivals: Iterable[Contender],
    reference: Tensors,
    pools: Pools,
    seconds: float,
) -> list[Outcome]:
    """Checks and times contenders on one mask, in rounds until `seconds` are over.

    Between `LEAST_ROUNDS` and `MOST_ROUNDS` rounds; who begins moves on by one each round. The
    yardstick runs in one process, all others over `world` ranks.
    """
    found = [Outcome(contender) for contender in rivals]
    for outcome in found:
        _check(outcome, case, world, shape, reference, pools)
        show(case, world, f"checked {outcome.contender.name}")
    running = [outcome for outcome in found if outcome.status == "ok"]
    start = time.monotonic()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and (time.monotonic() - start) * (done + 1) / done > seconds:
            break
        shift = done % max(1, len(running))
        for outcome in running[shift:] + running[:shift]:
            if outcome.status == "ok":
                _run(outcome, case, world, shape, pools)
        show(case, world, f"round {done + 1}")
    for size in (1, world):
        pools.forget(size)
    return found


def _group(contender: Contender, world: int) -> int:
    return 1 if contender is YARDSTICK else world


def _check(
    outcome: Outcome, case: MaskCase, world: int, shape: Shape, reference: Tensors, pools: Pools
) -> None:
    """Prepares a contender, runs it once and holds what it returns against the reference."""
    contender, size = outcome.contender, _group(outcome.contender, world)
    reason = contender.refusal(case, shape, size)
    if reason is not None:
        outcome.stop("refused", reason)
        return
    try:
        parts = pools.prepare(size, Prepare(contender, case, shape))
    except PoolError as error:
        outcome.stop("error", str(error))
        print(error.details, file=sys.stderr)
        return
    outcome.note = parts[0].note
    if parts[0].planned_bytes is not None:
        outcome.planned_bytes = sum(part.planned_bytes or 0 for part in parts)
    results = assemble(parts, case.seq_len)
    outcome.errors = relative_errors(results, reference)
    reason = wrong_reason(outcome.errors, shape.dtype)
    if reason:
        outcome.stop("error", reason)


def relative_errors(results: Sequence[torch.Tensor], reference: Tensors) -> dict[str, float]:
    """Relative 2-norm error of whole out, dq, dk, dv; the largest float where one is not finite."""
    errors = {}
    for name, got, want in zip(RESULTS, results, reference, strict=True):
        error = float((got.double() - want).norm() / want.norm())
        errors[name] = error if np.isfinite(error) else float(np.finfo(float).max)
    return errors


def wrong_reason(errors: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong with results of these relative errors, in one line; None if nothing is."""
    wrong = {name: error for name, error in errors.items() if error > TOLERANCE[dtype]}
    if not wrong:
        return None
    sizes = ", ".join(f"{error:.1e}" for error in wrong.values())
    return f"wrong {', '.join(wrong)}: relative error {sizes}; not timed"


def _run(outcome: Outcome, case: MaskCase, world: int, shape: Shape, pools: Pools) -> None:
    size = _group(outcome.contender, world)
    try:
        outcome.add(pools.time(size, Prepare(outcome.contender, case, shape)))
    except PoolError as error:
        outcome.stop("error", str(error))


def show(case: MaskCase, world: int, text: str) -> None:
    """One line of progress, overwritten by the next."""
    print(f"  {case.name}, {world} ranks: {text}".ljust(78), end="\r", flush=True)

"""What a rank does for ``ringattn bench kernels``: one kernel on one problem, by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ringattn.benchmarks.kernel_cases import Case
from ringattn.benchmarks.kernel_measure import Bench, Outcome, Timing
from ringattn.benchmarks.peers.base import Tensors
from ringattn.benchmarks.suites.cells import Problem
from ringattn.benchmarks.suites.judge import Judge
from ringattn.kernels.select import kernel_by_name
from ringattn.masks import Mask
from ringattn.schedule import Direction

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class SuiteCase(Case):
    """A problem as the kernel benchmark sees it."""

    problem: Problem | None = None

    @classmethod
    def of(cls, problem: Problem) -> "SuiteCase":
        """The case of a problem."""
        dims = (problem.head_dim, problem.head_dim)
        return cls(problem.mask, problem.seq_len, problem.heads, dims, problem.dtype, problem)

    def build(self) -> Mask:
        """The mask."""
        assert self.problem is not None
        return self.problem.built()


@dataclass(frozen=True, eq=False)
class SuiteBench(Bench):
    """A bench whose results are judged as those of sharded attention are, lse among them."""

    whole: int = 2048

    @cached_property
    def judge(self) -> Judge:
        """The reference."""
        return Judge(self._problem, self.device.type, self.whole)

    @property
    def _problem(self) -> Problem:
        assert isinstance(self.case, SuiteCase)
        assert self.case.problem is not None
        return self.case.problem

    @cached_property
    def inputs(self) -> Tensors:
        """q, k, v, dout (1, S, heads, D) on the device."""
        return self._problem.inputs(self.device.type)

    def _outcome(
        self,
        direction: Direction,
        got: dict,
        timing: Timing | None,
        prepare: float,
        lse: torch.Tensor | None = None,
    ) -> Outcome:
        checked = got if lse is None else got | {"lse": lse}
        tokens = np.arange(self.case.seq_len)
        errors = self.judge.errors([sampled_results(tokens, checked, self.judge.sample)])
        reason = self.judge.wrong(errors)
        if reason:
            return Outcome(direction=direction, status="error", reason=reason)
        found = super()._outcome(direction, got, timing, prepare)
        own = sum(x.nbytes for x in (*self.inputs, *checked.values()))
        peak = own + (found.figures["workspace_bytes"] or 0)
        more = {"errors": errors, "peak_bytes": peak}
        return Outcome(
            direction=direction, status="ok", tflops=found.tflops, spread=found.spread,
            figures=found.figures | more,
        )  # fmt: skip


def sampled_results(
    positions: np.ndarray, results: Mapping[str, torch.Tensor | None], sample: Any
) -> dict[str, Any]:
    """The results that are judged, with the tokens of their rows: all, or a sample's.

    Args:
        positions: global token of each row, -1 for padding.
        results: (1, T, heads[, D]) by name. sample: as `Judge.sample`.
    """
    real = np.flatnonzero(positions >= 0)
    found: dict[str, Any] = {}
    for name, value in results.items():
        if value is None:
            continue
        mine, heads = real, slice(None)
        if sample is not None:
            rows = name in ("out", "lse", "dq")
            wanted = sample["rows" if rows else "keys"]
            mine = real[np.isin(positions[real], wanted)]
            key = sample["key_head"]
            heads = slice(*sample["heads"]) if rows else slice(key, key + 1)
        index = torch.from_numpy(mine).to(value.device)
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        part = value[0].index_select(0, index)[:, heads].to("cpu", wide)
        found[name] = {"tokens": positions[mine], "values": part.numpy()}
    return found


def measure_kernel(
    problem: Problem, kernel: str, device: torch.device, seconds: float, whole: int
) -> dict[str, Any]:
    """Both passes of a kernel on a problem, by direction: status, reason, figures."""
    bench = SuiteBench(SuiteCase.of(problem), device, seconds, check=False, whole=whole)
    made = kernel_by_name(kernel)
    reason = bench.refusal(made)
    if reason is not None:
        return {d: {"status": "refused", "reason": reason} for d in DIRECTIONS}
    found = {}
    for outcome in bench.measure(made, DIRECTIONS):
        entry: dict[str, Any] = {"status": outcome.status, "reason": outcome.reason}
        if outcome.status == "ok":
            assert outcome.tflops is not None
            entry |= {
                "tflops": outcome.tflops, "spread": outcome.spread,
                "seconds": outcome.figures["ms"] / 1e3,
                "peak_bytes": outcome.figures["peak_bytes"],
                "errors": outcome.figures["errors"],
                "repetitions": outcome.figures["repetitions"],
            }  # fmt: skip
        found[outcome.direction] = entry
    return found

"""Holds results against a float64 reference: those of short sequences whole, a sample of others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import ringattn as ra
from ringattn.benchmarks import kernel_reference
from ringattn.benchmarks.kernel_reference import Sample
from ringattn.benchmarks.suites.cells import Problem
from ringattn.kernels.block_matrix import BlockMatrix
from ringattn.masks import Mask
from ringattn.routing import run_time_matrix, select_whole

RESULTS = ("out", "lse", "dq", "dk", "dv")
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}
"""Relative 2-norm errors beyond which a result is wrong."""
TOLERANCE_TF32 = 5e-3


class Judge:
    """The reference of one problem.

    Args:
        problem: what is computed. device: of the reference.
        whole: longest sequence that is judged whole.
        seconds: what the reference took is nobody's time; nothing is timed here.

    Attributes:
        sample: what ranks are asked for, JSON values; None for all.
    """

    def __init__(self, problem: Problem, device: str, whole: int) -> None:
        self.problem, self._device = problem, device
        self.sample: dict[str, Any] | None = None
        inputs = problem.inputs(device)
        if problem.seq_len <= whole:
            self._want = _whole(problem, inputs)
        else:
            drawn = Sample.draw(problem.seq_len, problem.heads, problem.seed)
            self.sample = {
                "rows": drawn.rows.tolist(),
                "keys": drawn.keys.tolist(),
                "key_head": drawn.key_head,
                "heads": [drawn.heads.start, drawn.heads.stop],
            }
            self._want = _of_sample(problem, inputs, drawn)

    @property
    def tolerance(self) -> float:
        """Largest relative error of a right result."""
        coarse = self._device == "cuda" and self.problem.dtype == "float32"
        return TOLERANCE_TF32 if coarse else TOLERANCE[self.problem.dtype]

    def errors(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Relative errors by result, of what all ranks returned; inf for rows that none has."""
        found = {}
        for name in RESULTS:
            mine = [part[name] for part in parts if name in part]
            if mine:
                want = self._want[name]
                tokens = np.concatenate([part["tokens"] for part in mine])
                values = np.concatenate([part["values"] for part in mine])
                found[name] = _error(want, self._placed(name, tokens, values))
        return found

    def _placed(self, name: str, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Rows in the order of the reference; NaN where no rank has one."""
        placed = np.full(self._want[name].shape, np.nan)
        index = tokens
        if self.sample is not None:
            kept = self.sample["rows" if name in ("out", "lse", "dq") else "keys"]
            index = np.searchsorted(kept, tokens)
        placed[index] = values
        return placed

    def wrong(self, errors: Mapping[str, float]) -> str:
        """What is wrong, in one line; "" for nothing."""
        bad = [f"{name} {e:.1e}" for name, e in errors.items() if not e <= self.tolerance]
        return f"wrong result: relative error of {', '.join(bad)}; not timed" if bad else ""


def _error(want: np.ndarray, got: np.ndarray) -> float:
    """Relative 2-norm; -inf (rows that see nothing) must meet -inf."""
    nothing = np.isneginf(want)
    if (np.isneginf(got) != nothing).any():
        return float(np.finfo(float).max)
    gap = np.where(nothing, 0.0, got - np.where(nothing, 0.0, want))
    norm = float(np.linalg.norm(np.where(nothing, 0.0, want)))
    error = float(np.linalg.norm(gap)) / max(norm, 1e-300)
    return error if np.isfinite(error) else float(np.finfo(float).max)


def _whole(problem: Problem, inputs: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    q, k, v, dout = inputs
    found = ra.reference(q, k, v, problem.built(), dout)
    return {name: _numbers(getattr(found, name)[0]) for name in RESULTS}


def _numbers(x: torch.Tensor) -> np.ndarray:
    return x.cpu().double().numpy()


def _of_sample(
    problem: Problem, inputs: Sequence[torch.Tensor], sample: Sample
) -> dict[str, np.ndarray]:
    """Rows and keys of one key head and its query heads, each of which may have its own mask."""
    q, k, v, dout = inputs
    mask, scale, key = problem.built(), problem.head_dim**-0.5, sample.key_head
    heads = range(sample.heads.start, sample.heads.stop)
    selection = None if mask.routing is None else select_whole(q, k, mask)[0].cpu().numpy()
    group = slice(key, key + 1)
    sums: dict[str, list[np.ndarray]] = {name: [] for name in RESULTS}
    for head in heads:
        one = _head_mask(mask, problem.heads[0], head, selection)
        at = slice(head, head + 1)
        alone = Sample(sample.rows, sample.keys, 0, slice(0, 1))
        parts = q[:, :, at], k[:, :, group], v[:, :, group], dout[:, :, at]
        found = kernel_reference.reference(one, *parts, scale, alone).results
        for name in RESULTS:
            sums[name].append(_numbers(found[name]))
    joined = {name: np.concatenate(sums[name], 1) for name in ("out", "lse", "dq")}
    return joined | {name: np.sum(sums[name], 0)[:, None] for name in ("dk", "dv")}


def _head_mask(mask: Mask, q_heads: int, head: int, selection: np.ndarray | None) -> Mask:
    """The mask of one query head, with the blocks that were selected for it."""
    if selection is None:
        return mask if mask.is_uniform else mask.for_heads(q_heads, head, head + 1)
    matrix = run_time_matrix(mask)
    chosen = selection[head * len(selection) // q_heads]
    allowed = np.zeros((len(matrix.q_edges) - 1, len(matrix.k_edges)), dtype=bool)
    np.put_along_axis(allowed, chosen.astype(np.int64) % allowed.shape[1], True, axis=1)
    known = BlockMatrix(matrix.q_edges, matrix.k_edges, allowed[:, :-1])
    return replace(mask, matrices=(known,), routing=None)

"""One-process tilings of a mask over PyTorch's CPU flash op: the baselines of `cpu_cost`.

A tiling is a list of calls, each a run of query rows with all its keys, so that no partial results
are merged. `own` is the project's kernel on the whole mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

import ringattn as ra
from ringattn.executor import backward_home, forward_home
from ringattn.kernels import TILE, kernel_by_name
from ringattn.schedule import Channel

forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Masked(Protocol):
    """What a tiling needs to know of a case."""

    @property
    def name(self) -> str: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def window(self) -> int: ...

    def mask(self) -> ra.Mask: ...


@dataclass(frozen=True)
class Call:
    """Query rows [q0, q1) over one or two runs of keys; causal, masked, or full."""

    q0: int
    q1: int
    keys: tuple[tuple[int, int], ...]
    causal: bool = False
    allowed: torch.Tensor | None = None


def names(case: Masked) -> tuple[str, ...]:
    """The tilings tried for a case; the cheapest is its baseline."""
    if case.name == "causal":
        return ("one_call",)
    if case.name == "window":
        return ("own", "rows_256", "rows_512", "rows_1024", "rows_2048")
    return ("own", "per_document")


def step(tiling: str, case: Masked, tensors: Sequence[torch.Tensor]) -> Callable[[], object]:
    """One forward and backward of a case under a tiling, as a function to time."""
    if tiling == "own":
        return _own(case, tensors)
    if tiling == "one_call":
        calls = [Call(0, case.seq_len, ((0, case.seq_len),), causal=True)]
    elif tiling.startswith("rows_"):
        calls = _window_rows(case, int(tiling.removeprefix("rows_")))
    else:
        calls = _documents(case)
    return _calls(calls, tensors)


def _documents(case: Masked) -> list[Call]:
    stop = np.cumsum(case.lengths)
    runs = [(int(b - n), int(b)) for n, b in zip(case.lengths, stop, strict=True)]
    question = runs[0]
    calls = []
    for a, b in runs:
        if case.name == "shared_question" and a > 0:
            own = torch.ones(b - a, b - a, dtype=torch.bool).tril_()
            allowed = torch.cat([torch.ones(b - a, question[1], dtype=torch.bool), own], 1)
            calls.append(Call(a, b, (question, (a, b)), allowed=allowed))
        else:
            calls.append(Call(a, b, ((a, b),), causal=True))
    return calls


def _window_rows(case: Masked, rows: int) -> list[Call]:
    calls = []
    for a in range(0, case.seq_len, rows):
        b, first = min(a + rows, case.seq_len), max(a - case.window + 1, 0)
        distance = torch.arange(first, b)[None] - torch.arange(a, b)[:, None]
        allowed = (distance <= 0) & (distance > -case.window)
        calls.append(Call(a, b, ((first, b),), allowed=allowed))
    return calls


def _bias(allowed: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if allowed is None:
        return None
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def _calls(calls: list[Call], tensors: Sequence[torch.Tensor]) -> Callable[[], object]:
    q, k, v, dout = (x.transpose(1, 2) for x in tensors)
    biases = [_bias(call.allowed, q.dtype) for call in calls]

    def keys(x: torch.Tensor, call: Call) -> torch.Tensor:
        parts = [x[:, :, a:b] for a, b in call.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def run() -> None:
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for call, bias in zip(calls, biases, strict=True):
            rows = slice(call.q0, call.q1)
            operands = (q[:, :, rows], keys(k, call), keys(v, call))
            out, lse = forward_op(*operands, 0.0, call.causal, attn_mask=bias)
            grads = backward_op(
                dout[:, :, rows], *operands, out, lse, 0.0, call.causal, attn_mask=bias
            )
            dq[:, :, rows] = grads[0]
            offset = 0
            for a, b in call.keys:
                part = slice(offset, offset + b - a)
                dk[:, :, a:b] += grads[1][:, :, part]
                dv[:, :, a:b] += grads[2][:, :, part]
                offset += b - a

    return run


def _own(case: Masked, tensors: Sequence[torch.Tensor]) -> Callable[[], object]:
    q, k, v, dout = tensors
    bands = case.mask().bands
    tiles = np.zeros(len(bands), dtype=TILE)
    for name in ("q0", "q1", "k0", "k1", "lo", "hi", "step"):
        tiles[name] = bands[name]
    tiles["h1"] = q.shape[2]
    kernel = kernel_by_name("cpu_flash")
    prepared = kernel.prepare(tiles, q.device)
    options = {"scale": q.shape[-1] ** -0.5, "softcap": None}

    def run() -> None:
        out, lse = forward_home(q, k, v, None)[Channel.O, 0]
        kernel.forward(q, k, v, prepared, out, lse, **options)
        delta = (dout.float() * out.to(q.dtype).float()).sum(-1)
        home = backward_home(dout, q, k, v, lse, delta)
        (dq,), (dk, dv) = home[Channel.DQ, 0], home[Channel.DKV, 0]
        kernel.backward(dout, q, k, v, lse, delta, prepared, dq, dk, dv, **options)
        for gradient in (dq, dk, dv):
            gradient.to(q.dtype)

    return run

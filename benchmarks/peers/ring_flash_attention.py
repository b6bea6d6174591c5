"""ring-flash-attention: its zigzag ring for causal, its plain ring for full, llama3 for documents.

Zigzag wants chunks r and 2P - 1 - r of 2P on rank r. The llama3 form keeps the sequence in order,
gathers keys and values head by head, and takes the documents' offsets; a causal window over one
document is the same call with flash-attn's window.
"""

import importlib
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from ringattn.benchmarks.peers.base import Attend, Prepared, Shape, prepare_autograd, rows_at
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.flash_attention import flash_refusal
from ringattn.benchmarks.peers.packages import import_refusal, installed_version
from ringattn.benchmarks.peers.patterns import CAUSAL, FULL, WINDOW
from ringattn.benchmarks.peers.zigzag_ring import zigzag_positions

INSTALL = "pip install flash-attn ring-flash-attn (needs CUDA)"


@dataclass(frozen=True)
class RingFlashAttention:
    """See the module docstring. Implements `base.Contender`."""

    name: str = "ring_flash_attn"
    package: str = "ring-flash-attn"

    def installed(self) -> str | None:
        """Version of ring-flash-attn."""
        return installed_version(self.package, "ring_flash_attn")

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs the package and its kernels, tokens that divide, and a mask that it has."""
        missing = import_refusal(self.package, ("ring_flash_attn",), INSTALL)
        if missing:
            return missing
        window = case.pattern == WINDOW and case.ahead == 0
        if not (case.pattern in (FULL, CAUSAL) or case.is_packed or window):
            return f"it has full, causal, causal windows and documents, no mask like {case.name}"
        parts = 2 * world if case.pattern == CAUSAL else world
        if case.seq_len % parts:
            return f"{case.seq_len} tokens do not divide into {parts} chunks"
        return flash_refusal(shape)

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        rfa = importlib.import_module("ring_flash_attn")
        rows = case.seq_len // world
        positions = np.arange(rank * rows, (rank + 1) * rows)
        if case.pattern == CAUSAL:
            positions = zigzag_positions(case.seq_len, rank, world)
            attend, note = _zigzag(rfa), "zigzag_ring_flash_attn_func"
        elif case.pattern == FULL:
            attend, note = _ring(rfa), "ring_flash_attn_func"
        else:
            attend = _llama3(rfa, case, shape, rank, world)
            note = "llama3_flash_attn_varlen_func, one key head at a time"
        inputs = rows_at(shape.inputs(case.seq_len), positions)
        return prepare_autograd(positions, attend, inputs, note)


def _zigzag(rfa: Any) -> Attend:
    return lambda q, k, v: rfa.zigzag_ring_flash_attn_func(q, k, v, causal=True)


def _ring(rfa: Any) -> Attend:
    return lambda q, k, v: rfa.ring_flash_attn_func(q, k, v, causal=False)


def _llama3(rfa: Any, case: MaskCase, shape: Shape, rank: int, world: int) -> Attend:
    lengths = case.lengths or (case.seq_len,)
    offsets = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    prepare = rfa.llama3_flash_attn_prepare_cu_seqlens
    cu_q, cu_k, max_q, max_k, keys = prepare(offsets.to(shape.device), case.causal, rank, world)
    function = rfa.llama3_flash_attn_varlen_func
    window = (case.window - 1, 0) if case.pattern == WINDOW else (-1, -1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(
            q[0],
            k[0],
            v[0],
            cu_q,
            cu_k,
            max_q,
            max_k,
            heads_k_stride=1,
            local_k_slice=keys,
            causal=case.causal,
            window_size=window,
        )
        return out[None]

    return attend

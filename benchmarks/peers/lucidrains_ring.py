"""ring-attention-pytorch: its `ring_flash_attn` in PyTorch ops, contiguous shards.

Query head h of it belongs to key head h mod Hkv, so heads are put in that order before and back
after the call.
"""

import importlib
from dataclasses import dataclass

import numpy as np
import torch

from ringattn.benchmarks.peers.base import Prepared, Shape, prepare_autograd, rows_at
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.packages import import_refusal, installed_version
from ringattn.benchmarks.peers.patterns import CAUSAL, FULL

BUCKET = 512


@dataclass(frozen=True)
class LucidrainsRing:
    """See the module docstring. Implements `base.Contender`."""

    name: str = "ring_attention_pytorch"
    package: str = "ring-attention-pytorch"

    def installed(self) -> str | None:
        """Version of ring-attention-pytorch."""
        return installed_version(self.package, "ring_attention_pytorch")

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs the package, tokens that divide into buckets on each rank, full or causal."""
        missing = import_refusal(
            self.package, ("ring_attention_pytorch",), f"pip install {self.package}"
        )
        if missing:
            return missing
        if case.pattern not in (FULL, CAUSAL):
            return f"it has full and causal, no mask like {case.name}"
        rows = case.seq_len // world
        if case.seq_len % world or rows % min(rows, BUCKET):
            return f"{case.seq_len} tokens do not divide into {world} shards of {BUCKET}-buckets"
        return None

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        ring_flash_attn = importlib.import_module("ring_attention_pytorch").ring_flash_attn
        rows, group = case.seq_len // world, shape.q_heads // shape.kv_heads
        positions = np.arange(rank * rows, (rank + 1) * rows)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ordered = q.unflatten(2, (shape.kv_heads, group)).transpose(2, 3).flatten(2, 3)
            out = ring_flash_attn(
                ordered,
                k,
                v,
                causal=case.pattern == CAUSAL,
                bucket_size=BUCKET,
                ring_reduce_col=world > 1,
                ring_size=world,
            )
            return out.unflatten(2, (group, shape.kv_heads)).transpose(2, 3).flatten(2, 3)

        inputs = rows_at(shape.inputs(case.seq_len), positions)
        return prepare_autograd(positions, attend, inputs, "PyTorch ops, contiguous ring")

"""USP as yunchang runs it: `LongContextAttention`, Ulysses inside a zigzag ring.

As many ranks share the heads as divide both head counts; the rest form the ring. The package's own
extractor says which tokens a rank holds. Its groups are global state, set again by every `prepare`.
"""

import importlib
from dataclasses import dataclass
from math import gcd

import torch

from ringattn.benchmarks.peers.base import Prepared, Shape, prepare_autograd, rows_at
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.flash_attention import flash_refusal
from ringattn.benchmarks.peers.packages import import_refusal, installed_version
from ringattn.benchmarks.peers.patterns import CAUSAL, FULL, WINDOW


@dataclass(frozen=True)
class USP:
    """See the module docstring. Implements `base.Contender`."""

    name: str = "yunchang_usp"
    package: str = "yunchang"

    def installed(self) -> str | None:
        """Version of yunchang."""
        return installed_version(self.package, self.package)

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs the package and flash-attn, tokens that divide, and a mask that it has."""
        install = "pip install flash-attn yunchang (needs CUDA)"
        missing = import_refusal(self.package, ("yunchang", "yunchang.kernels"), install)
        if missing:
            return missing
        ring = world // heads_degree(shape, world)
        if case.pattern == WINDOW and ring > 1:
            return f"its ring of {ring} takes a window as one of every block by itself"
        if case.pattern not in (FULL, CAUSAL, WINDOW):
            return f"it has full and causal, no mask like {case.name}"
        if case.seq_len % (2 * world):
            return f"{case.seq_len} tokens do not divide into {2 * world} chunks"
        return flash_refusal(shape)

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        yunchang = importlib.import_module("yunchang")
        attention_type = importlib.import_module("yunchang.kernels").AttnType.FA
        heads = heads_degree(shape, world)
        ring = world // heads
        yunchang.set_seq_parallel_pg(heads, ring, rank, world)
        kind = "zigzag" if case.causal else "basic"
        tokens = torch.arange(case.seq_len).view(1, -1, 1)
        held = yunchang.EXTRACT_FUNC_DICT[kind](tokens, rank, world_size=world, rd=ring, ud=heads)
        positions = held.reshape(-1).numpy()
        module = yunchang.LongContextAttention(ring_impl_type=kind, attn_type=attention_type)
        window = (case.window - 1, case.ahead) if case.pattern == WINDOW else (-1, -1)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return module(q, k, v, causal=case.causal, window_size=window)

        inputs = rows_at(shape.inputs(case.seq_len), positions)
        return prepare_autograd(
            positions, attend, inputs, f"{kind}, {heads} ranks by heads, ring of {ring}"
        )


def heads_degree(shape: Shape, world: int) -> int:
    """Ranks that share the heads: the most that divide both head counts and the world."""
    return gcd(world, shape.q_heads, shape.kv_heads)

"""TransformerEngine: `DotProductAttention` with a context-parallel group: p2p, a2a, all_gather.

Rank r holds chunks r and 2P - 1 - r of 2P; of every document, padded to 2P chunks, where they are
packed ("thd"). Which kernel computes it is the package's own choice.
"""

import importlib
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from ringattn.benchmarks.peers.base import Prepared, Shape, prepare_autograd, rows_at
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.packages import call_refusal, import_refusal, installed_version
from ringattn.benchmarks.peers.patterns import CAUSAL, FULL, WINDOW
from ringattn.benchmarks.peers.zigzag_ring import zigzag_positions
from ringattn.benchmarks.peers.zigzag_varlen import document_positions

MODULE = "transformer_engine.pytorch"
INSTALL = "pip install 'transformer-engine[pytorch]' (needs CUDA and cuDNN)"
ROWS = 128


@dataclass(frozen=True)
class TransformerEngine:
    """See the module docstring. Implements `base.Contender`; `comm` is its `cp_comm_type`."""

    comm: str
    package: str = "transformer-engine"

    @property
    def name(self) -> str:
        """Unique in a comparison."""
        return f"transformer_engine_{self.comm}"

    def installed(self) -> str | None:
        """Version of TransformerEngine."""
        return installed_version(self.package, "transformer_engine")

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs the package, a device and dtype of its kernels, a mask, lengths, heads for a2a."""
        missing = import_refusal(self.package, (MODULE,), INSTALL)
        if missing:
            return missing
        if not (case.pattern in (FULL, CAUSAL, WINDOW) or case.is_packed):
            return f"under context parallel it has no mask like {case.name}"
        if case.pattern == WINDOW and self.comm == "p2p":
            return "its p2p has no windows"
        if not case.is_packed and case.seq_len % (2 * world):
            return f"{case.seq_len} tokens do not divide into {2 * world} chunks"
        if self.comm == "a2a" and (shape.q_heads % world or shape.kv_heads % world):
            return f"{shape.q_heads}:{shape.kv_heads} heads do not divide among {world} ranks"
        return _kernel_refusal(shape)

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        module = _module(shape, **_options(case))
        # A second stream for every other step is what its ring overlaps with.
        stream = torch.cuda.Stream() if shape.device == "cuda" else None
        module.set_context_parallel_group(dist.group.WORLD, list(range(world)), stream, self.comm)
        if case.is_packed:
            positions = document_positions(case.lengths, rank, world)
        else:
            positions = zigzag_positions(case.seq_len, rank, world)
        offsets = _offsets(case, shape, world) if case.is_packed else {}

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if case.is_packed:
                q, k, v = q[0], k[0], v[0]
            return module(q, k, v, **offsets).view(1, -1, shape.q_heads, shape.head_dim)

        inputs = rows_at(shape.inputs(case.seq_len), positions)
        note = f"cp_comm_type {self.comm}, {'thd' if case.is_packed else 'bshd'}"
        return prepare_autograd(positions, attend, inputs, note)


def _options(case: MaskCase) -> dict[str, Any]:
    options: dict[str, Any] = {"attn_mask_type": "causal" if case.causal else "no_mask"}
    if case.is_packed:
        kind = "padding_causal" if case.causal else "padding"
        return {"attn_mask_type": kind, "qkv_format": "thd"}
    if case.pattern == WINDOW:
        options["window_size"] = (case.window - 1, case.ahead)
    return options | {"qkv_format": "bshd"}


def _module(shape: Shape, **options: Any) -> Any:
    attention = importlib.import_module(MODULE).DotProductAttention(
        shape.q_heads,
        shape.head_dim,
        num_gqa_groups=shape.kv_heads,
        attention_dropout=0.0,
        **options,
    )
    return attention.to(shape.device)


def _offsets(case: MaskCase, shape: Shape, world: int) -> dict[str, torch.Tensor]:
    """Where documents begin, without and with their padding, over the whole sequence."""
    parts = 2 * world
    padded = [-(-length // parts) * parts for length in case.lengths]
    real, held = (
        torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32, device=shape.device)
        for sizes in (case.lengths, padded)
    )
    return {
        "cu_seqlens_q": real,
        "cu_seqlens_kv": real,
        "cu_seqlens_q_padded": held,
        "cu_seqlens_kv_padded": held,
    }


def _kernel_refusal(shape: Shape) -> str | None:
    """Why its kernels cannot run such inputs here, found by a call of `ROWS` tokens."""

    def call() -> None:
        module = _module(shape, attn_mask_type="causal", qkv_format="bshd")
        q, k, v, _ = (x.requires_grad_() for x in shape.inputs(ROWS))
        torch.autograd.grad(module(q, k, v).sum(), (q, k, v))

    return call_refusal(f"its kernels on {shape.device} in {shape.dtype}", call)

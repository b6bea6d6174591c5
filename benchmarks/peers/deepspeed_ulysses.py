"""DeepSpeed Ulysses: `deepspeed.sequence.layer.DistributedAttention` around local SDPA.

It exchanges heads for tokens by `all_to_all_single`, over gloo on a CPU, which is also what
DeepSpeed's own CPU path calls. Any mask will do that SDPA can be given for whole sequences. It
refuses fewer key heads than ranks; there keys and values are repeated before the call up to one
head per rank, as DeepSpeed's Hugging Face integration does.
"""

import importlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ringattn.benchmarks.peers.base import Prepared, Shape, prepare_autograd
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.local_sdpa import local_attention, local_refusal
from ringattn.benchmarks.peers.packages import import_refusal, installed_version


@dataclass(frozen=True)
class DeepSpeedUlysses:
    """See the module docstring. Implements `base.Contender`; the sequence is cut contiguously."""

    name: str = "deepspeed_ulysses"
    package: str = "deepspeed"

    def installed(self) -> str | None:
        """Version of DeepSpeed."""
        return installed_version(self.package, self.package)

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs the package, tokens divisible by ranks, and heads that divide or are divided."""
        missing = import_refusal(
            self.package, ("deepspeed.sequence.layer",), "pip install 'ringattn[deepspeed]'"
        )
        if missing:
            return missing
        if case.seq_len % world:
            return f"{case.seq_len} tokens do not divide among {world} ranks"
        if shape.q_heads % world:
            return f"{shape.q_heads} query heads do not divide among {world} ranks"
        if shape.kv_heads % world and world % shape.kv_heads:
            return f"{shape.kv_heads} key heads and {world} ranks: neither divides the other"
        return local_refusal(case, shape)

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        layer = importlib.import_module("deepspeed.sequence.layer")
        comm = importlib.import_module("deepspeed.comm")
        if not comm.is_initialized():
            # Collectives over shared memory would be compiled first; Ulysses uses none of them.
            importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = (
                False
            )
            backend = "nccl" if shape.device == "cuda" else "gloo"
            comm.init_distributed(dist_backend=backend, verbose=False)
        rows = case.seq_len // world
        mine = slice(rank * rows, (rank + 1) * rows)
        q, k, v, dout = (x[:, mine].contiguous() for x in shape.inputs(case.seq_len))
        share = shape.q_heads // world
        heads = range(rank * share, (rank + 1) * share)
        local, note = local_attention(case, shape, heads)
        module = layer.DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
        repeats = max(1, world // shape.kv_heads)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if repeats > 1:
                k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
            return module(q, k, v, 0)

        note += f", key heads repeated {repeats} times" * (repeats > 1)
        positions = np.arange(case.seq_len)[mine]
        return prepare_autograd(positions, attend, (q, k, v, dout), note)

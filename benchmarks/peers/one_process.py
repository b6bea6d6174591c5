"""The yardstick: one process that holds the whole sequence and calls PyTorch's SDPA."""

from dataclasses import dataclass

import numpy as np

from ringattn.benchmarks.peers.base import Prepared, Shape, autograd_run
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.local_sdpa import local_attention


@dataclass(frozen=True)
class OneProcess:
    """Runs in a group of one rank. Implements `base.Contender`."""

    name: str = "one_process"

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs a group of one."""
        del case, shape
        return None if world == 1 else f"it is one process, not {world}"

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        del rank, world
        q, k, v, dout = shape.inputs(case.seq_len)
        local, note = local_attention(case)
        return Prepared(np.arange(case.seq_len), autograd_run(local, (q, k, v), dout), note)

"""The yardstick: one process that holds the whole sequence and calls PyTorch's SDPA."""

from dataclasses import dataclass

import numpy as np
import torch

from ringattn.benchmarks.peers.base import Prepared, Shape, prepare_autograd
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.local_sdpa import local_attention, local_refusal


@dataclass(frozen=True)
class OneProcess:
    """Runs in a group of one rank. Implements `base.Contender`."""

    name: str = "one_process"
    package: str = "torch"

    def installed(self) -> str | None:
        """Version of PyTorch."""
        return torch.__version__

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs a group of one, and a mask that fits into memory."""
        if world != 1:
            return f"it is one process, not {world}"
        return local_refusal(case, shape)

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        del rank, world
        local, note = local_attention(case, shape)
        return prepare_autograd(np.arange(case.seq_len), local, shape.inputs(case.seq_len), note)

"""Contenders that fail in one way each, for the tests of the suites."""

import os
from dataclasses import dataclass

import numpy as np
import torch

from ringattn.benchmarks.peers.base import Prepared, Shape
from ringattn.benchmarks.peers.cases import MaskCase


@dataclass(frozen=True)
class Rival:
    """Runs nothing but its failure: "raises", "dies", "wrong" or "refuses"."""

    failure: str
    package: str = "ringattn"

    @property
    def name(self) -> str:
        return self.failure

    def installed(self) -> str | None:
        return "1"

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        del case, shape, world
        return "it is never able" if self.failure == "refuses" else None

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        mine = np.arange(case.seq_len)[rank::world]
        inputs = shape.inputs(case.seq_len)

        def results() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
            q, k, v, dout = (x[:, torch.from_numpy(mine)] for x in inputs)
            return dout, q, k, v

        def forward():
            if rank == 0 and self.failure == "raises":
                raise RuntimeError("this one raises")
            if rank == 0 and self.failure == "dies":
                os._exit(7)
            out, dq, dk, dv = results()
            return out, lambda: (dq, dk, dv)

        return Prepared(mine, results, "a test's", forward=forward)


RAISES, DIES, WRONG, REFUSES = (Rival(name) for name in ("raises", "dies", "wrong", "refuses"))

"""ringattn itself: `ContextParallel` over the default group, as a user calls it."""

from dataclasses import dataclass

import torch

import ringattn as ra
from ringattn.benchmarks.peers.base import Prepared, Shape, prepare_autograd
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.packages import installed_version


@dataclass(frozen=True)
class Ours:
    """A `ContextParallel` with a method and a cluster; the layout is always "auto"."""

    name: str
    method: str = "auto"
    cluster: str | None = None
    package: str = "ringattn"

    def installed(self) -> str | None:
        """Version of ringattn."""
        return installed_version(self.package, self.package)

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Whatever building the plan refuses."""
        try:
            self._context(shape, world).plan(case.mask())
        except ra.UserError as error:
            return str(error)
        return None

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        plan = self._context(shape, None).plan(case.mask())
        q, k, v, dout = (plan.shard(x) for x in shape.inputs(case.seq_len))

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ra.attention(q, k, v, plan)

        return prepare_autograd(
            plan.positions().cpu().numpy(),
            attend,
            (q, k, v, dout),
            f"{plan.layout.name}, {plan.method}",
            planned_bytes=plan.bytes(rank, "forward") + plan.bytes(rank, "backward"),
        )

    def _context(self, shape: Shape, group: int | None) -> ra.ContextParallel:
        return ra.ContextParallel(
            group,
            heads=(shape.q_heads, shape.kv_heads),
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            method=self.method,
            cluster=self.cluster,
        )

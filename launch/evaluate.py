"""Loss on the held-out split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.launch.engine import Engine
from ringattn.launch.feed import open_loader, take_share
from ringattn.launch.metrics import EvalMetrics
from ringattn.launch.packing import IGNORE, Batches, PackedDataset
from ringattn.parallel.mesh import TrainMesh


@dataclass(frozen=True, kw_only=True)
class _Spread(Batches):
    """`packs` of `total` packs of one length at equal distances, dp of them per step.

    The last step may be short of packs; it is filled up with the pack after the split's end, whose
    labels do not count, so that every rank takes part in every step.
    """

    packs: int
    total: int

    def starts(self, step: int) -> np.ndarray:
        """Position of each pack of `step`, int64 (1, dp, 1)."""
        number = step * self.dp + np.arange(self.dp, dtype=np.int64)
        packs = np.where(number < self.packs, number * self.total // self.packs, self.total)
        return self.seq_len(step) * packs.reshape(1, self.dp, 1)


@torch.no_grad()
def evaluate(
    engine: Engine,
    heldout: PackedDataset,
    cp: ra.ContextParallel,
    mesh: TrainMesh,
    device: torch.device,
    *,
    step: int,
    packs: int,
    windows: Sequence[int | None],
) -> EvalMetrics:
    """Mean loss over `packs` held-out packs, spread evenly over the split (all, if fewer).

    The result does not depend on dp or cp. Every rank calls it; all get the same numbers.

    Args:
        engine: the model.
        heldout: the held-out split.
        cp: plans attention for the mesh's cp group.
        mesh: dp ranks share the packs among them.
        device: of this rank.
        step: optimizer steps done, for the record.
        packs: most packs to read.
        windows: of the model's layers.
    """
    packs = min(packs, heldout.packs)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    stages = ((0, heldout.seq_len),)
    batches = _Spread(stages=stages, dp=mesh.dp, packs=packs, total=heldout.packs)
    rounds = range(-(-packs // mesh.dp))
    with open_loader(heldout, batches, cp, mesh.dp_rank, rounds, windows) as loader:
        for batch in loader:
            for micro in batch.micro:
                share = take_share(micro, device)
                loss = engine.loss_sum(
                    share.tokens_BT, share.labels_BT, share.positions_T, share.attend
                )
                sums[0] += loss
                sums[1] += (share.labels_BT != IGNORE).sum()
    dist.all_reduce(sums, group=mesh.world)
    total, count = sums.tolist()
    return EvalMetrics(step=step, loss=total / max(count, 1.0), tokens=int(count))

"""Loss on the held-out split."""

import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.launch.engine import ReplicatedEngine
from ringattn.launch.feed import open_loader, take_share
from ringattn.launch.metrics import EvalMetrics
from ringattn.launch.packing import IGNORE, Batches, PackedDataset
from ringattn.parallel.mesh import TrainMesh


@torch.no_grad()
def evaluate(
    engine: ReplicatedEngine,
    heldout: PackedDataset,
    cp: ra.ContextParallel,
    mesh: TrainMesh,
    device: torch.device,
    *,
    step: int,
    packs: int,
) -> EvalMetrics:
    """Mean loss over the first `packs` held-out packs (all, if there are fewer).

    The result does not depend on dp or cp. Every rank calls it; all get the same numbers.

    Args:
        engine: the model.
        heldout: the held-out split.
        cp: plans attention for the mesh's cp group.
        mesh: dp ranks share the packs among them.
        device: of this rank.
        step: optimizer steps done, for the record.
        packs: most packs to read.
    """
    packs = min(packs, heldout.packs)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    rounds = range(-(-packs // mesh.dp))
    with open_loader(heldout, Batches(dp=mesh.dp), cp, mesh.dp_rank, rounds) as loader:
        for batch in loader:
            for micro in batch.micro:
                if micro.indices[0] >= packs:
                    # The last round may be short of packs: this rank takes part without counting.
                    micro.labels[:] = IGNORE
                share = take_share(micro, device)
                loss = engine.loss_sum(
                    share.tokens_BT, share.labels_BT, share.positions_T, share.attend
                )
                sums[0] += loss
                sums[1] += (share.labels_BT != IGNORE).sum()
    dist.all_reduce(sums, group=mesh.world)
    total, count = sums.tolist()
    return EvalMetrics(step=step, loss=total / max(count, 1.0), tokens=int(count))

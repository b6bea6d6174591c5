"""From packs to one rank's tensors: plans in the loader, sharding on the way to the device."""

from dataclasses import dataclass

import torch

import ringattn as ra
from ringattn.launch.config import Config
from ringattn.launch.data_loader import Loader, MicroBatch
from ringattn.launch.packing import Batches, PackedDataset
from ringattn.selective import cheap_part


@dataclass(frozen=True)
class PlanAttend:
    """Attention by a plan, as the model calls it: an `Attend`."""

    plan: ra.Plan

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `ringattn.attention`."""
        return ra.attention(q, k, v, self.plan)

    def recalled(
        self, recall: ra.Recall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """The same inside an activation checkpoint; see `ringattn.Recall`."""
        return recall(q, k, v, self.plan)


@dataclass(frozen=True)
class Share:
    """One rank's part of a micro-batch, on its device.

    Attributes:
        tokens_BT, labels_BT: int64 (1, T_local); labels were shifted on the whole sequence.
        positions_T: int64 (T_local,), places in the whole sequence; rotary embedding uses them.
        attend: attention over the whole sequence, for all layers or each of them; a collective of
            the cp group.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_T: torch.Tensor
    attend: PlanAttend | list[PlanAttend]


def open_loader(
    dataset: PackedDataset,
    batches: Batches,
    cp: ra.ContextParallel,
    dp_rank: int,
    steps: range,
    recompute: float | None = None,
) -> Loader[ra.Plan]:
    """Reads the packs of `steps` in a thread and plans each one's document-causal attention.

    Planning is host work without communication. With `recompute`, the share of the attention
    forward that may be computed again, plans of the rows that are cheap are made as well.
    """

    def make_plan(lengths: list[int]) -> ra.Plan:
        plan = cp.plan(ra.masks.documents(lengths, causal=True))
        if recompute is not None:
            cheap_part(plan, recompute)
        return plan

    return Loader(
        dataset,
        batches,
        make_plan,
        dp_rank=dp_rank,
        start_step=steps.start,
        stop_step=steps.stop,
    )


def take_share(micro: MicroBatch[ra.Plan], device: torch.device) -> Share:
    """This rank's tokens, labels and positions of a micro-batch. No communication."""
    plan = micro.plan

    def local(values: torch.Tensor) -> torch.Tensor:
        return plan.shard(values[None], dim=1).to(device, non_blocking=True)

    return Share(
        tokens_BT=local(torch.from_numpy(micro.tokens)),
        labels_BT=local(torch.from_numpy(micro.labels)),
        positions_T=plan.positions().to(device, non_blocking=True),
        attend=PlanAttend(plan),
    )


def causal_area(lengths: list[int]) -> int:
    """Allowed pairs of a document-causal mask."""
    return sum(length * (length + 1) // 2 for length in lengths)


def step_batches(config: Config, origin_step: int, origin_pack: int) -> Batches:
    """Which packs each step reads, when `origin_pack` packs were read before `origin_step`."""
    return Batches(
        dp=config.parallel.dp,
        accumulate=config.train.accumulate,
        origin_step=origin_step,
        origin_pack=origin_pack,
    )

"""From packs to one rank's tensors: plans in the loader, sharding on the way to the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import ringattn as ra
from ringattn.launch.config import Config
from ringattn.launch.data_loader import Deal, Loader, MicroBatch
from ringattn.launch.packing import Batches, PackedDataset
from ringattn.selective import cheap_part

LayerPlans = list[ra.Plan]  # one per layer, all on one layout


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
        attend: attention over the whole sequence, of each layer; a collective of the ranks that
            share the sequence.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_T: torch.Tensor
    attend: list[PlanAttend]


def layer_masks(lengths: list[int], windows: Sequence[int | None]) -> list[ra.Mask]:
    """The document-causal mask of each layer, with the layer's window."""
    masks = {w: ra.masks.documents(lengths, causal=True, window=w) for w in dict.fromkeys(windows)}
    return [masks[window] for window in windows]


def plan_maker(
    cp: ra.ContextParallel, windows: Sequence[int | None]
) -> Callable[[list[int]], LayerPlans]:
    """Plans every layer's attention over packed documents of the given lengths."""
    return lambda lengths: cp.plans(layer_masks(lengths, windows))


def open_loader(
    dataset: PackedDataset,
    batches: Batches,
    cp: ra.ContextParallel,
    dp_rank: int,
    steps: range,
    windows: Sequence[int | None],
    deal: Deal[LayerPlans] | None = None,
    recompute: float | None = None,
) -> Loader[LayerPlans]:
    """Reads the packs of `steps` in a thread and plans each one's document-causal attention.

    Planning is host work without communication. `windows` are those of the layers; `deal` spreads
    a step's packs in another way than over dp ranks (`ringattn.launch.degree_feed`). With
    `recompute`, the share of the attention forward that may be computed again, plans of the rows
    that are cheap are made as well. Steps that cannot be read are handed out with their error.
    """
    make = plan_maker(cp, windows)

    def complete(plans: LayerPlans) -> LayerPlans:
        if recompute is not None:
            for plan in dict.fromkeys(plans):
                cheap_part(plan, recompute)
        return plans

    return Loader(
        dataset,
        batches,
        lambda lengths: complete(make(lengths)),
        dp_rank=dp_rank,
        start_step=steps.start,
        stop_step=steps.stop,
        deal=deal
        and (lambda *packs: [(starts, complete(plans)) for starts, plans in deal(*packs)]),
        keep_errors=True,
    )


def take_share(micro: MicroBatch[LayerPlans], device: torch.device) -> Share:
    """This rank's tokens, labels and positions of a micro-batch. No communication."""
    plan = micro.plan[0]

    def local(values: torch.Tensor) -> torch.Tensor:
        return plan.shard(values[None], dim=1).to(device, non_blocking=True)

    return Share(
        tokens_BT=local(torch.from_numpy(micro.tokens)),
        labels_BT=local(torch.from_numpy(micro.labels)),
        positions_T=plan.positions().to(device, non_blocking=True),
        attend=[PlanAttend(layer) for layer in micro.plan],
    )


def own_areas(micro: MicroBatch[LayerPlans]) -> list[int]:
    """Allowed pairs of each layer's mask on the first rank that shares the micro-batch, zeros on
    the others: the sum over all ranks counts every pack once."""
    if micro.plan[0].context.rank:
        return [0] * len(micro.plan)
    areas = {plan: plan.mask.area for plan in dict.fromkeys(micro.plan)}
    return [areas[plan] for plan in micro.plan]


def step_batches(config: Config, origin_step: int, origin: int) -> Batches:
    """Which tokens each step reads, when `origin` tokens were read before `origin_step`."""
    return Batches(
        stages=config.data.stages,
        dp=config.parallel.dp,
        accumulate=config.train.accumulate,
        origin_step=origin_step,
        origin=origin,
    )

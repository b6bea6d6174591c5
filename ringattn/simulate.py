"""All ranks of a plan in one process, in turn: the executor without a network."""

import math
from typing import Any, NamedTuple

import torch

from ringattn.arena import Arena
from ringattn.checks import check_scale, check_softcap, check_tensors
from ringattn.errors import UserError
from ringattn.executor import Run, Slots, backward_home, forward_home
from ringattn.parallel.fabric import LocalFabric
from ringattn.plan import Plan
from ringattn.routing import select_whole
from ringattn.schedule import Channel, Direction
from ringattn.sharding import join_shards


class Simulated(NamedTuple):
    """Whole-sequence results, and the bytes each rank received: (forward, backward) per rank."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    dsinks: torch.Tensor | None
    received: tuple[tuple[int, ...], tuple[int, ...]]


def simulate(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Simulated:
    """Runs a plan's ranks in one process and returns whole tensors.

    Args:
        plan: from a `ContextParallel` over any group, simulated or real; nothing is communicated.
        q: (B, S, Hq, D). k, v: (B, S, Hkv, D), (B, S, Hkv, E), in sequence order.
        dout: (B, S, Hq, E); without it there is no backward.
        scale, softcap, sinks: as in `attention`.
    """
    _check(plan, q, k, v, sinks, dout)
    check_scale(scale)
    check_softcap(softcap)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    ranks = range(plan.world)

    def shards(x: torch.Tensor) -> list[torch.Tensor]:
        return [plan.shard(x, rank=rank) for rank in ranks]

    def join(parts: list[torch.Tensor]) -> torch.Tensor:
        return join_shards(parts, plan.layout, 1)

    qs, ks, vs = shards(q), shards(k), shards(v)
    selection = None
    if plan.mask.routing is not None:
        selection = plan.selection(select_whole(q, k, plan.mask))
    options = {"scale": scale, "softcap": softcap, "selection": selection}
    homes = [forward_home(qs[r], ks[r], vs[r], sinks) for r in ranks]
    runs, sent = _lockstep(plan, "forward", homes, options, [{}] * plan.world)
    kept = [{key: run.slots[key] for key in plan.forward.saved if key in run.slots} for run in runs]
    partial = [run.slots[Channel.O, 0] for run in runs]
    outs, lses = [out.to(q.dtype) for out, _ in partial], [lse for _, lse in partial]
    if dout is None:
        return Simulated(join(outs), join(lses), None, None, None, None, (sent, ()))
    douts = shards(dout)
    deltas = [
        (d.to(s.dtype) * o.to(s.dtype)).sum(-1) for d, o, s in zip(douts, outs, lses, strict=True)
    ]
    homes = [backward_home(douts[r], qs[r], ks[r], vs[r], lses[r], deltas[r]) for r in ranks]
    runs, back = _lockstep(plan, "backward", homes, options, kept)
    dq = join([run.slots[Channel.DQ, 0][0] for run in runs]).to(q.dtype)
    dk, dv = (join([run.slots[Channel.DKV, 0][i] for run in runs]).to(k.dtype) for i in (0, 1))
    dsinks = None
    if sinks is not None:
        weights = [torch.exp(sinks.to(s.dtype) - s) for s in lses]
        dsinks = -sum(
            ((w * d).sum((0, 1)) for w, d in zip(weights, deltas, strict=True)), sinks * 0
        )
    return Simulated(join(outs), join(lses), dq, dk, dv, dsinks, (sent, back))


def _lockstep(
    plan: Plan,
    direction: Direction,
    homes: list[Slots],
    options: dict[str, Any],
    saved: list[Slots],
) -> tuple[list[Run], tuple[int, ...]]:
    runs = []
    for rank, fabric in enumerate(LocalFabric.group(plan.world)):
        program = plan.chosen_program(direction, rank, homes[rank], options["softcap"])
        runs.append(Run(program, fabric, Arena(), homes[rank], saved=saved[rank], **options))
    for index in range(plan.schedule(direction).nsteps):
        for run in runs:
            run.post(index, run.program.steps[index])
        for run in runs:
            run.compute(run.program.steps[index])
        for run in runs:
            run.land(index, run.program.steps[index])
    return runs, tuple(run.fabric.received_bytes for run in runs)


def _check(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    dout: torch.Tensor | None,
) -> None:
    if q.dim() != 4 or q.shape[1] != plan.mask.seq_len:
        raise UserError(
            f"q of shape {tuple(q.shape)}",
            f"must be (B, {plan.mask.seq_len}, Hq, D)",
            "pass the whole sequence",
        )
    check_tensors(plan.context, plan.mask.seq_len, q, k, v, sinks)
    expected = (*q.shape[:3], v.shape[-1])
    if dout is not None and tuple(dout.shape) != expected:
        raise UserError(
            f"dout of shape {tuple(dout.shape)}", f"must be {expected}", "pass the gradient of out"
        )

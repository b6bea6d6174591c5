"""What a rank does for the attention suites: prepares, checks and times what it is asked for.

A request and its answer are dicts of JSON values and NumPy arrays, so that they can travel over a
pipe or over the store of a launcher's job. Whatever goes wrong is raised, but a refusal, which is
made before anything is sent and therefore alike on all ranks, is an answer.
"""

import gc
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn import choice
from ringattn.arena import Arena
from ringattn.benchmarks import peers
from ringattn.benchmarks.memory_trace import MemoryTrace
from ringattn.benchmarks.peers.base import Contender, Tensors
from ringattn.benchmarks.peers.cases import case_of_mask
from ringattn.benchmarks.suites.cells import OURS, Entrant, Problem
from ringattn.benchmarks.suites.kernel_work import measure_kernel, sampled_results
from ringattn.benchmarks.wire import counted_wire
from ringattn.errors import UserError
from ringattn.executor import Run
from ringattn.methods.common import Problem as Posed
from ringattn.parallel.group_ref import GroupRef
from ringattn.parallel.host import cache_bytes
from ringattn.plan import Plan

PASSES = ("forward", "backward")
GPU_FLUSH = 256 << 20
Backward = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Share:
    """One entrant's share of a problem on this rank.

    Attributes:
        positions: int64 (T,), the global token of each local row; -1 for padding.
        forward: runs once on the selected blocks (None without routing); returns out, lse (None
            where the entrant has none) and the backward.
        route: selects blocks of a routed mask, else None.
        layout, method: what was chosen. note: how it is computed.
        planned: bytes that this rank is to receive, by pass; None where nobody knows.
        counted: whether the wire count sees what is sent.
        before: called before the first run; may communicate.
    """

    positions: np.ndarray
    forward: Callable[[torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None, Backward]]
    route: Callable[[], torch.Tensor | None] = lambda: None
    layout: str = ""
    method: str = ""
    note: str = ""
    planned: Mapping[str, int] | None = None
    counted: bool = True
    before: Callable[[], None] = lambda: None


class Worker:
    """One rank. Every rank of a group gets the same requests in the same order.

    Args:
        rank, world: in the default group. device: of this rank.
        staged: as in `ContextParallel`. timeout: seconds that a move may take.
    """

    def __init__(
        self, rank: int, world: int, device: torch.device, staged: str | None, timeout: float
    ) -> None:
        self.rank, self.world, self.device, self.staged = rank, world, device, staged
        self.timeout = timeout
        self._contexts: dict[tuple, ra.ContextParallel] = {}
        self._alone: GroupRef | None = None
        self._shares: dict[str, Share] = {}
        self._inputs: tuple[Problem, Tensors] | None = None
        self._flush: torch.Tensor | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Does what is asked: "prepare", "time", "forget" or "kernel"."""
        kind = request["do"]
        if kind == "forget":
            self._shares.clear()
            gc.collect()
            return {}
        if kind == "time":
            return self._time(self._shares[request["key"]], bool(request["flush"]))
        problem = _problem(request["problem"])
        if kind == "kernel":
            terms = request["kernel"], self.device, request["seconds"], request["whole"]
            return measure_kernel(problem, *terms)
        entrant = Entrant(**request["entrant"])
        share = self._share(problem, entrant)
        if isinstance(share, str):
            return {"refused": share}
        self._shares[entrant.key] = share
        return self._check(share, request["sample"])

    def _share(self, problem: Problem, entrant: Entrant) -> Share | str:
        """The share, or why the entrant refuses. Does not communicate."""
        if entrant.contender == OURS:
            try:
                return self._ours(problem, entrant)
            except UserError as error:
                return str(error)
        peer, mask = peer_named(entrant.contender), problem.built()
        case, shape = case_of_mask(mask, problem.mask), problem.shape(self.device.type)
        reason = peer.refusal(case, shape, self.world)
        if reason is not None:
            return reason
        made = peer.prepare(case, shape, self.rank, self.world)
        forward = made.forward
        assert forward is not None, f"{entrant.contender} does not split its passes"

        def run(blocks: torch.Tensor | None) -> tuple[torch.Tensor, None, Backward]:
            del blocks
            out, backward = forward()
            return out, None, backward

        return Share(made.positions, run, note=made.note, counted=made.counted)

    def _ours(self, problem: Problem, entrant: Entrant) -> Share:
        plan = self._plan(problem, entrant)
        q, k, v, dout = (plan.shard(x).contiguous() for x in self._whole(problem))
        leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        scale, saved = 1 / math.sqrt(problem.head_dim), plan.saved_numel

        def route() -> torch.Tensor | None:
            return None if plan.mask.routing is None else ra.route(q, k, plan)

        def forward(
            blocks: torch.Tensor | None,
        ) -> tuple[torch.Tensor, torch.Tensor, Backward]:
            out, lse, _ = torch.ops.ringattn.attention(
                q, k, v, None, plan.handle, scale, 0.0, blocks, saved
            )

            def backward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                dq, dk, dv = torch.autograd.grad(out, leaves, dout)
                return dq, dk, dv

            return out.detach(), lse.detach(), backward

        def begin() -> None:
            # A plan's first run compares it over the group and opens what it uses.
            context, fabric = plan.context, plan.context.fabric(self.device)
            context.agreements.ensure(plan.digest, fabric)
            # A run's memory is otherwise that of the largest plan so far.
            context.arena = Arena()

        rank = plan.context.rank
        return Share(
            plan.layout.positions(rank),
            forward,
            route,
            plan.layout.name,
            plan.method,
            planned={d: plan.bytes(rank, d) for d in PASSES},
            before=begin,
        )

    def _plan(self, problem: Problem, entrant: Entrant) -> Plan:
        """The plan, over contexts that all problems of a shape share, and their communicators."""
        whole = entrant.cluster is not None and entrant.method == "auto"
        context = self._context(problem, entrant.cluster if whole else None, entrant.alone)
        mask, node = problem.built(), entrant.ranks_per_node or context.ranks_per_node
        if whole:
            return context.plan(mask)
        mask.head_counts(problem.heads[0])

        def pose(mask: ra.Mask, layout: ra.Layout) -> Posed:
            return Posed(
                mask=mask, layout=layout, shapes=context.shapes, ranks_per_node=node,
                wire=context.wire,
            )  # fmt: skip

        found = choice.choose(mask, context.world, node, entrant.layout, entrant.method, pose)
        layout, method, schedules = found
        return Plan(context, mask, layout, method, schedules)

    def _context(self, problem: Problem, cluster: str | None, alone: bool) -> ra.ContextParallel:
        key = problem.heads, problem.head_dim, problem.dtype, cluster, alone
        if key not in self._contexts:
            self._contexts[key] = ra.ContextParallel(
                self._own_group() if alone else None,
                heads=problem.heads,
                head_dim=problem.head_dim,
                dtype=getattr(torch, problem.dtype),
                cluster=cluster,
                staged=self.staged,
                timeout=timedelta(seconds=self.timeout),
            )
        return self._contexts[key]

    def _own_group(self) -> dist.ProcessGroup | None:
        """A group of this rank only; communicates when it is first asked for."""
        if self._alone is None and self.world > 1:
            mine = [dist.new_group([rank]) for rank in range(self.world)][self.rank]
            assert isinstance(mine, dist.ProcessGroup)
            self._alone = GroupRef(mine)
        return None if self._alone is None else self._alone()

    def _whole(self, problem: Problem) -> Tensors:
        if self._inputs is None or self._inputs[0] != problem:
            self._inputs = problem, problem.inputs(self.device.type)
        return self._inputs[1]

    def _check(self, share: Share, sample: Mapping[str, Any] | None) -> dict[str, Any]:
        """The first run: results, bytes on the wire, peak memory."""
        share.before()
        results, sent, received = {}, {}, {}

        def body(part: Callable[[str], Any]) -> None:
            with counted_wire(self.rank, self.world) as wire:
                blocks = share.route()
            received["routing"] = wire.received
            with part("forward"), counted_wire(self.rank, self.world) as wire:
                out, lse, backward = share.forward(blocks)
            sent["forward"], received["forward"] = wire.sent, wire.received
            with part("backward"), counted_wire(self.rank, self.world) as wire:
                dq, dk, dv = backward()
            sent["backward"], received["backward"] = wire.sent, wire.received
            results.update(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        trace = MemoryTrace(self.device).run(body)
        own = sum(results[name].nbytes for name in ("dq", "dk", "dv", "out"))
        return {
            "results": sampled_results(share.positions, results, sample),
            "layout": share.layout,
            "method": share.method,
            "note": share.note,
            "planned": None if share.planned is None else dict(share.planned),
            "sent": sent if share.counted else None,
            "received": received if share.counted else None,
            # The shards of q, k, v and dout are as large as those of the results.
            "peak": {name: own + trace.peaks.get(name, 0) - before for name in PASSES},
        }

    def _time(self, share: Share, flush: bool) -> dict[str, Any]:
        """One timed run: wall, CPU and kernel seconds of each pass."""
        found = {}
        step: Callable[[], Any] = lambda: share.forward(share.route())  # noqa: E731
        gc.disable()
        try:
            for name in PASSES:
                if flush:
                    self._empty_caches()
                self._barrier()
                with kernel_clock(self.device) as kernels, _clock(self.device) as seconds:
                    made = step()
                if name == "forward":
                    step = made[2]
                wall, cpu = seconds()
                found[name] = {"wall": wall, "cpu": cpu, "kernels": kernels()}
        finally:
            gc.enable()
        return found

    def _barrier(self) -> None:
        if self.world > 1:
            alone = self.device.type == "cuda" and self.staged is None
            dist.barrier(device_ids=[torch.cuda.current_device()] if alone else None)

    def _empty_caches(self) -> None:
        """Writes more than the last level of cache holds."""
        if self._flush is None:
            size = GPU_FLUSH if self.device.type == "cuda" else cache_bytes() + (8 << 20)
            self._flush = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._flush.fill_(1)


def _problem(fields: Mapping[str, Any]) -> Problem:
    return Problem(**{**fields, "heads": tuple(fields["heads"])})


def peer_named(name: str) -> Contender:
    """A shipped adapter by its name, or one's own as "module:attribute"."""
    module, separator, attribute = name.partition(":")
    if separator:
        return getattr(importlib.import_module(module), attribute)
    known = {peer.name: peer for peer in (*peers.contenders(), peers.YARDSTICK)}
    return known[name]


@contextmanager
def _clock(device: torch.device) -> Iterator[Callable[[], tuple[float, float]]]:
    """Yields a function that, after the block, gives (wall, CPU) seconds of the block."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cpu = time.process_time()
        start.record()

        def events() -> tuple[float, float]:
            torch.cuda.synchronize(device)
            return start.elapsed_time(stop) / 1e3, cpu

        yield events
        stop.record()
        cpu = time.process_time() - cpu
        return
    times: list[float] = []
    wall, used = time.perf_counter(), time.process_time()
    yield lambda: (times[0], times[1])
    times += [time.perf_counter() - wall, time.process_time() - used]


@contextmanager
def kernel_clock(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Times the kernels of our plans inside the block; yields a function that gives their seconds,
    None where no plan ran. On CUDA between events, else wall time."""
    compute, spans = Run.compute, []

    def timed(run: Run, step: Any) -> None:
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            compute(run, step)
            stop.record()
            spans.append((start, stop))
            return
        begin = time.perf_counter()
        compute(run, step)
        spans.append((begin, time.perf_counter()))

    def total() -> float | None:
        if not spans:
            return None
        if device.type == "cuda":
            return sum(start.elapsed_time(stop) for start, stop in spans) / 1e3
        return sum(stop - begin for begin, stop in spans)

    with patch.object(Run, "compute", timed):
        yield total


def serve(request: Mapping[str, Any], rank: int, world: int, kept: dict[str, Any]) -> Any:
    """`Worker.answer` for a `RankPool`: the first request is the worker's terms."""
    if request["do"] == "open":
        device = torch.device("cpu")
        if request["gpus"]:
            device = torch.device("cuda", rank % request["gpus"])
            torch.cuda.set_device(device)
        staged = "cuda" if request["gpus"] and request["gpus"] < world else None
        kept["worker"] = Worker(rank, world, device, staged, request["timeout"])
        return {}
    return kept["worker"].answer(request)

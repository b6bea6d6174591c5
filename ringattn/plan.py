"""`Plan`: how a group of ranks attends one mask, and how a rank runs it."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ringattn.checks import check_tensors, is_routed
from ringattn.cost import price_pair
from ringattn.errors import UserError
from ringattn.executor import Run, Slots, backward_home, forward_home
from ringattn.kernels.block_matrix import Selection
from ringattn.kernels.measured import architecture_of
from ringattn.kernels.select import choose_kernels, kernel_by_name
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.operators import register
from ringattn.program import Program, build_program
from ringattn.routing_exchange import Router
from ringattn.schedule import Channel, Direction, Schedule, Wire
from ringattn.sharding import Unshard, take_shard
from ringattn.workload import work_of

if TYPE_CHECKING:
    from ringattn.context import ContextParallel


@dataclass(frozen=True)
class Settings:
    """What was chosen for a plan generator; None leaves a setting to the context.

    Attributes:
        options: of the method. wire: dtype of travelling partial results.
    """

    options: dict[str, int] | None = None
    wire: Wire | None = None


class Plan:
    """How a group computes attention under one mask: a layout, a forward and a backward schedule.

    Made by `ContextParallel.plan`. Equal on all ranks; `digest` is compared across the group when
    the plan is first used.

    Attributes:
        mask, layout: what attends what, and who owns what.
        method: name of the plan generator.
        forward, backward: `ringattn.schedule.Schedule`.
        settings: of the plan generator, where they were chosen by predicted time.
        handle: the integer by which `ringattn::attention` finds the plan.
        saved_numel: elements that this rank keeps from forward to backward, per batch element.
    """

    def __init__(
        self,
        context: "ContextParallel",
        mask: Mask,
        layout: Layout,
        method: str,
        schedules: tuple[Schedule, Schedule],
        settings: Settings | None = None,
    ) -> None:
        self.context, self.mask, self.layout, self.method = context, mask, layout, method
        self.forward, self.backward = schedules
        self.settings = Settings() if settings is None else settings
        self.handle = register(self)
        self._programs: dict[tuple[str, int, str, str], Program] = {}
        self._chosen: dict[tuple[Any, ...], Program] = {}
        self._routers: dict[str, Router] = {}
        self.parts: dict[float, Any] = {}  # see `ringattn.selective`
        # A plain number, so that compiled code need not look into the tables.
        self.saved_numel = self.forward.saved_bytes(context.rank) // context.shapes.itemsize

    def __repr__(self) -> str:
        return f"Plan({self.mask!r}, {self.layout.name}, {self.method}, world={self.world})"

    @property
    def world(self) -> int:
        """Ranks that share the sequence."""
        return self.layout.world

    @cached_property
    def digest(self) -> str:
        """Equal digests mean equal plans."""
        return f"{self.forward.digest[:32]}{self.backward.digest[:32]}"

    @cached_property
    def seconds(self) -> float | None:
        """Predicted seconds, forward and backward, of the slowest rank; None without a cluster."""
        cluster, kernel = self.context.cluster, self.context.priced_kernel
        if cluster is None:
            return None
        return sum(p.seconds for p in price_pair((self.forward, self.backward), cluster, kernel))

    def schedule(self, direction: Direction) -> Schedule:
        """The schedule of one direction."""
        if direction not in ("forward", "backward"):
            raise UserError(f"direction={direction!r}", "must be forward or backward", "pick one")
        return self.forward if direction == "forward" else self.backward

    def bytes(self, rank: int, direction: Direction) -> int:
        """Bytes that a rank receives in one direction, per batch element."""
        return self.schedule(direction).bytes(self._rank(rank))

    def peak_bytes(self, rank: int) -> int:
        """Bytes beyond the shards that either direction needs on a rank, per batch element."""
        return max(self.forward.peak_bytes(rank), self.backward.peak_bytes(rank))

    def positions(self, rank: int | None = None) -> torch.Tensor:
        """Global positions of a rank's tokens (this rank's by default), int64 (T,)."""
        mine = self.layout.positions(self._rank(rank))
        return torch.from_numpy(mine).to(self.context.device)

    def shard(self, x: torch.Tensor, dim: int = 1, rank: int | None = None) -> torch.Tensor:
        """A rank's rows (this rank's by default) of a whole tensor along its token dim."""
        if x.shape[dim] != self.mask.seq_len:
            raise UserError(
                f"tensor with {x.shape[dim]} tokens in dim {dim}",
                f"the plan is for {self.mask.seq_len} tokens",
                "shard the whole sequence, or pass the right dim",
            )
        return take_shard(x, self.layout, self._rank(rank), dim)

    def _rank(self, rank: int | None) -> int:
        if rank is None:
            return self.context.rank
        if not 0 <= rank < self.world:
            raise UserError(
                f"rank={rank}", f"the plan has {self.world} ranks", f"pass 0 to {self.world - 1}"
            )
        return rank

    def unshard(self, local: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The whole tensor on every rank, from each rank's rows; differentiable.

        All ranks of the group communicate. The gradient of the whole tensor is taken to be the
        same on every rank (a replicated loss): the backward returns this rank's rows of it.
        """
        self.context.require_ranks("plan.unshard")
        rows = int(self.layout.sizes[self.context.rank])
        if local.shape[dim] != rows:
            raise UserError(
                f"tensor with {local.shape[dim]} tokens in dim {dim}",
                f"this rank owns {rows}",
                "pass this rank's rows, or the right dim",
            )
        whole = Unshard.apply(local, self.layout, self.context.group, dim)
        assert isinstance(whole, torch.Tensor)
        return whole

    def check(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> None:
        """Raises UserError where the tensors do not fit this plan on this rank."""
        self.context.require_ranks("attention")
        check_tensors(self.context, int(self.layout.sizes[self.context.rank]), q, k, v, sinks)

    def program(
        self, direction: Direction, rank: int, kernel: str, device: torch.device
    ) -> Program:
        """A rank's part of a schedule for a kernel and a device; built once."""
        key = (direction, rank, kernel, str(device))
        if key not in self._programs:
            made = kernel_by_name(kernel)
            self._programs[key] = build_program(self.schedule(direction), rank, made, device)
        return self._programs[key]

    def run_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        blocks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The forward on this rank: (out in q's dtype, lse, saved). All ranks communicate.

        `saved` holds what the backward starts from, flat; empty for most plans.
        """
        home = forward_home(q, k, v, sinks)
        run = self._run("forward", home, scale, softcap, self.selection(blocks))
        run.execute()
        out, lse = run.slots[Channel.O, 0]
        return out.to(q.dtype), lse, self._pack(run, q)

    def run_backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        scale: float,
        softcap: float | None,
        blocks: torch.Tensor | None = None,
        saved: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The backward on this rank: (dq, dk, dv) in the inputs' dtypes. All ranks communicate."""
        home = backward_home(dout, q, k, v, lse, delta)
        kept = {} if saved is None else self._unpack(saved, q, k, v)
        run = self._run("backward", home, scale, softcap, self.selection(blocks), kept)
        run.execute()
        (dq,), (dk, dv) = run.slots[Channel.DQ, 0], run.slots[Channel.DKV, 0]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _pack(self, run: Run, q: torch.Tensor) -> torch.Tensor:
        """A copy of the saved slots: a run's own memory is used again by the next."""
        kept = [t for key in self.forward.saved for t in run.slots.get(key, ())]
        return torch.cat([t.flatten() for t in kept]) if kept else q.new_empty(0)

    def _unpack(
        self, saved: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Slots:
        """`_pack` undone."""
        home: Slots = {(Channel.Q, 0): (q,), (Channel.K, 0): (k, v)}
        slots, offset = {}, 0
        table = self.forward.slots[self.forward.slots["rank"] == self.context.rank]
        sizes = {(int(s["channel"]), int(s["slot"])): s for s in table}
        for key in self.forward.saved:
            if key not in sizes:
                continue
            rows, heads, parts = int(sizes[key]["rows"]), int(sizes[key]["heads"]), []
            for like in home[key[0], 0]:
                shape = (like.shape[0], rows, heads, like.shape[3])
                count = shape[0] * rows * heads * shape[3]
                parts.append(saved[offset : offset + count].view(shape))
                offset += count
            slots[key] = tuple(parts)
        return slots

    def chosen_program(
        self, direction: Direction, rank: int, home: Slots, softcap: float | None
    ) -> Program:
        """A rank's part of a schedule for the kernel that suits such home slots best.

        Forward and backward, and each rank, choose for themselves: by device, dtype, head dims and
        the rank's tiles, which may be refused by a kernel that would take the tensors.
        """
        q, (_, v) = home[Channel.Q, 0][0], home[Channel.K, 0]
        device, head_dim = q.device, (q.shape[-1], v.shape[-1])
        key = (direction, rank, str(device), q.dtype, head_dim, softcap)
        if key in self._chosen:
            return self._chosen[key]
        kernels = choose_kernels(
            self.context.kernel,
            device=device.type,
            dtype=q.dtype,
            head_dim=head_dim,
            softcap=softcap,
            work=work_of(self.schedule(direction), rank),
            architecture=architecture_of(device),
        )
        for kernel in kernels:
            try:
                self._chosen[key] = self.program(direction, rank, kernel.name, device)
                return self._chosen[key]
            except UserError:
                if kernel is kernels[-1]:
                    raise
        raise AssertionError("at least one kernel")

    def selection(self, blocks: torch.Tensor | None) -> Selection | None:
        """Selected blocks as kernels take them."""
        return None if blocks is None else Selection(blocks, self.context.heads[0])

    def select_blocks(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The blocks that a routed mask's queries attend; see `ringattn.route`.

        All ranks communicate. The tables of a device are made at the first call.
        """
        is_routed(self.mask)
        self.check(q, k, k.new_empty((*k.shape[:3], self.context.head_dim[1])), None)
        device = q.device
        self.context.agreements.ensure(self.digest, self.context.fabric(device))
        if str(device) not in self._routers:
            made = Router.of(self.mask, self.layout, self.context.rank, device)
            self._routers[str(device)] = made
        group = self.context.group
        assert group is not None
        return self._routers[str(device)].select(q, k, group)

    def _run(
        self,
        direction: Direction,
        home: Slots,
        scale: float,
        softcap: float | None,
        selection: Selection | None,
        saved: Slots | None = None,
    ) -> Run:
        context, device = self.context, home[Channel.Q, 0][0].device
        program = self.chosen_program(direction, context.rank, home, softcap)
        fabric = context.fabric(device)
        context.agreements.ensure(self.digest, fabric)
        fabric.open(program.classes)
        return Run(
            program,
            fabric,
            context.arena,
            home,
            scale,
            softcap,
            selection,
            saved or {},
            context.place,
        )

"""`ContextParallel`: a group of ranks that share sequences; makes and caches plans."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Lock
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn import checks, choice, planner, stack
from ringattn.agreement import Agreements
from ringattn.arena import Arena
from ringattn.cost import Cluster, peak_bytes
from ringattn.errors import UserError
from ringattn.group import resolve_group
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.methods.common import Problem
from ringattn.parallel.fabric import Fabric, ProcessGroupFabric, backend_of
from ringattn.parallel.group_ref import GroupRef
from ringattn.parallel.staged import StagedFabric, check_staging
from ringattn.parallel.topology import ranks_per_node as launcher_ranks_per_node
from ringattn.place import Place
from ringattn.plan import Plan, Settings

PLANS_KEPT = 64
T = TypeVar("T")


class ContextParallel:
    """A group of ranks that share sequences; makes and caches plans.

    Args:
        group: a one-axis `DeviceMesh`, a `ProcessGroup`, None for the default group, or an integer
            number of simulated ranks (plans can be built, verified and simulated, not run).
        heads: (Hq, Hkv), Hq a multiple of Hkv.
        head_dim: D, or (D of q and k, D of v); at most 256.
        dtype: dtype of q, k, v; other dtypes are then refused. None accepts any and counts bytes
            for torch's default dtype.
        method: name of a plan generator, or "auto".
        layout: name of a layout, a `Layout`, or "auto".
        kernel: name of a local kernel, or "auto".
        wire_dtype: dtype of travelling partial results: torch.float32 (default; float64 for
            float64 inputs), `dtype`, or "auto": whichever is predicted to be faster on the cluster.
        cluster: name of a cluster, path of its YAML file, or a `Cluster`: "auto" is then chosen by
            predicted time on it. None weighs mask area and bytes at a fixed rate.
        ranks_per_node: consecutive ranks that share a node; default from the launcher, for
            simulated ranks from the cluster.
        refine: plans that a search for a better layout may price, where the cluster chooses and the
            layout is not a `Layout`; default none. Each costs about as much as a plan.
        memory_limit: most bytes per batch element that a plan may need beyond the shards.
        timeout: how long a move may take on gloo; the group's own timeout by default.
        staged: "cuda" sends CUDA tensors through pinned host memory over gloo, so that ranks may
            share a GPU, which NCCL refuses; "cpu" does the same with CPU tensors, as a test.
            Default: straight over the group's back end.
        options: settings of the method, e.g. {"stages": 4} for direct. What is left open is chosen
            by predicted time where there is a cluster.
        layout_options: settings of a named layout, e.g. {"max_imbalance": 1.05} for node_balanced
            (see `ringattn.layouts`).

    Building it does not communicate. Raises UserError for arguments that cannot work.
    """

    def __init__(
        self,
        group: "DeviceMesh | dist.ProcessGroup | int | None",
        *,
        heads: tuple[int, int],
        head_dim: int | tuple[int, int],
        dtype: torch.dtype | None = None,
        method: str = "auto",
        layout: "str | Layout" = "auto",
        kernel: str = "auto",
        wire_dtype: "torch.dtype | str | None" = None,
        cluster: "str | os.PathLike[str] | Cluster | None" = None,
        ranks_per_node: int | None = None,
        memory_limit: int | None = None,
        timeout: timedelta | None = None,
        staged: str | None = None,
        options: dict[str, int] | None = None,
        layout_options: "dict[str, int | float] | None" = None,
        refine: int | None = None,
    ) -> None:
        found, self.world, self.rank = resolve_group(group)
        self._group = None if found is None else GroupRef(found)
        self.simulated = isinstance(group, int)
        self.heads, self.head_dim = checks.head_counts(heads), checks.head_dims(head_dim)
        self.dtype, self.method, self.layout, self.kernel = dtype, method, layout, kernel
        self.memory_limit, self.timeout, self.refine = memory_limit, timeout, refine or 0
        self.options = checks.settings(options, "options")
        self.layout_options = checks.settings(layout_options, "layout_options")
        self.cluster = checks.cluster(cluster)
        self.ranks_per_node = ranks_per_node or self._node_size()
        self.shapes = checks.shapes(self.heads, self.head_dim, dtype)
        self.wire = checks.wire(wire_dtype, dtype)
        self.any_wire = checks.weighed_wire(wire_dtype, self.cluster is not None)
        checks.names(method, layout, kernel)
        checks.layout_world(layout, self.world)
        checks.counts(
            ranks_per_node=ranks_per_node, memory_limit=memory_limit, refine=refine or None
        )
        checks.options(self.options, method, self.cluster is not None)
        checks.layout_options(self.layout_options, layout)
        checks.is_duration(timeout)
        check_staging(staged, found)
        self.staged = staged
        self.arena, self.agreements, self.place = Arena(), Agreements(), Place()
        self._fabrics: dict[str, Fabric] = {}
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._layouts: OrderedDict[str, Layout] = OrderedDict()
        self._lock = Lock()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group, which is not kept alive; None for simulated ranks.

        Raises RuntimeError when it has been destroyed.
        """
        return None if self._group is None else self._group()

    @property
    def device(self) -> torch.device:
        """Where positions are put: this rank's accelerator for NCCL groups and where CUDA tensors
        are staged, else the CPU."""
        nccl = self.group is not None and backend_of(self.group, "cuda") == "nccl"
        if self.staged == "cuda" or (nccl and self.staged is None):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def fabric(self, device: torch.device) -> Fabric:
        """The fabric over the group for tensors of a device. Opens nothing yet."""
        key = device.type
        if key not in self._fabrics:
            assert self.group is not None
            kind = ProcessGroupFabric if self.staged is None else StagedFabric
            self._fabrics[key] = kind(self.group, device, self.timeout)
        return self._fabrics[key]

    def require_ranks(self, what: str) -> None:
        """Raises UserError when the group is simulated."""
        if self.simulated:
            raise UserError(
                f"{what} over {self.world} simulated ranks",
                "needs a process group",
                "pass a mesh or a ProcessGroup, or use ringattn.simulate",
            )

    def plan(self, mask: Mask, *, layout: Layout | None = None) -> Plan:
        """The plan for a mask. Cached; pure host work, so a data loader's thread may call it.

        Args:
            mask: what is attended.
            layout: where the tokens lie already, in place of the group's own choice.

        Raises:
            UserError: the layout does not fit the mask, or the plan needs more than `memory_limit`.
        """
        checks.is_mask(mask)
        mask.head_counts(self.heads[0])  # refuses head groups that do not fit
        if layout is not None:
            checks.layout_world(layout, self.world)
        key = mask.key if layout is None else f"{mask.key} on {layout.key}"
        return _cached(self._lock, self._plans, key, lambda: self._offers(mask, layout)[0])

    def plans(self, masks: Sequence[Mask]) -> list[Plan]:
        """One plan per layer of a stack with a mask for each, all on one layout.

        Tokens are sharded once, so the layout is chosen for the stack: by the least predicted time
        of all layers on the cluster, by nominal cost without one. Equal masks share one `Plan`;
        `method="auto"` is chosen for each mask. Cached; pure host work.

        Args:
            masks: of each layer, over the same tokens; where all are equal, as `plan`.

        Raises:
            UserError: no mask, masks of different lengths, or as for `plan`.
        """
        counts = stack.count_layers(masks)
        for mask in counts:
            mask.head_counts(self.heads[0])  # refuses head groups that do not fit
        if len(counts) == 1:
            return [self.plan(masks[0])] * len(masks)
        key = " ".join(f"{count}x{mask.key}" for mask, count in counts.items())
        layout = _cached(self._lock, self._layouts, key, lambda: self._stack_layout(counts))
        found = {mask: self.plan(mask, layout=layout) for mask in counts}
        return [found[mask] for mask in masks]

    def compare(
        self, mask: Mask, *, exhaustive: bool = False, layout: Layout | None = None
    ) -> planner.Comparison:
        """Prices the candidates for a mask on the cluster, fastest first. Pure host work.

        Args:
            mask: what is attended.
            exhaustive: price those too that cannot win; the choice is the same.
            layout: as for `plan`.

        Raises:
            UserError: there is no cluster, or no candidate fits `memory_limit`.
        """
        checks.is_mask(mask)
        mask.head_counts(self.heads[0])  # refuses head groups that do not fit
        if self.cluster is None:
            raise UserError("cluster=None", "prices need a cluster", 'pass e.g. cluster="h100_sxm"')
        return planner.compare(
            mask,
            self.world,
            self.ranks_per_node,
            layout or self.layout,
            self.method,
            self._problem,
            planner.Terms(
                cluster=self.cluster,
                kernel=self.priced_kernel,
                memory_limit=self.memory_limit,
                any_wire=self.any_wire,
                layout_options=tuple(self.layout_options.items()),
                refine=self.refine,
            ),
            exhaustive=exhaustive,
        )

    @property
    def priced_kernel(self) -> str | None:
        """The kernel that plans are priced with on the cluster; None for the cluster's own."""
        return self.kernel if self.cluster and self.kernel in self.cluster.kernels else None

    def _offers(self, mask: Mask, place: Layout | None) -> list[Plan]:
        """Plans of a mask, the best first, each on another layout; on one layout where it is said.

        On a cluster these are the best of each layout that was priced.
        """
        if self.cluster is not None and self._is_open():
            offers: dict[str, Plan] = {}
            for quote in self.compare(mask, layout=place).quotes:
                if quote.layout.key not in offers:
                    chosen = quote.candidate
                    settings = Settings(dict(chosen.options), chosen.wire)
                    offers[quote.layout.key] = Plan(
                        self, mask, quote.layout, chosen.method, quote.schedules, settings
                    )
            return list(offers.values())
        layout, method, schedules = choice.choose(
            mask,
            self.world,
            self.ranks_per_node,
            place or self.layout,
            self.method,
            self._problem,
            self.layout_options,
        )
        plan = Plan(self, mask, layout, method, schedules)
        if self.memory_limit is not None:
            need = max(int(peak_bytes(schedule).max()) for schedule in schedules)
            if need > self.memory_limit:
                raise UserError(
                    f"memory_limit={self.memory_limit}",
                    f"the {method} plan needs {need} bytes beyond the shards",
                    "raise the limit, use more ranks or another method",
                )
        return [plan]

    def problem(self, mask: Mask, like: Plan) -> Problem:
        """A mask posed on the layout of a plan, with the settings of its method. Host work."""
        settings = like.settings
        options = self.options if settings.options is None else settings.options
        return self._problem(mask, like.layout).with_options(options, settings.wire)

    def _stack_layout(self, counts: dict[Mask, int]) -> Layout:
        return stack.choose_layout(
            counts,
            lambda mask: self._offers(mask, None),
            lambda mask, layout: self.plan(mask, layout=layout),
        )

    def _is_open(self) -> bool:
        """Whether there is anything to choose."""
        return (
            "auto" in (self.method, self.layout)
            or self.any_wire
            or self.refine > 0
            or planner.is_open(self.shapes, self.world, self.ranks_per_node, self.method)
        )

    def _node_size(self) -> int:
        """Ranks of a node where the caller does not say."""
        if self.simulated and self.cluster is not None:
            return min(self.cluster.ranks_per_node, self.world)
        return launcher_ranks_per_node(self.world)

    def _problem(self, mask: Mask, layout: Layout) -> Problem:
        return Problem(
            mask=mask,
            layout=layout,
            shapes=self.shapes,
            ranks_per_node=self.ranks_per_node,
            wire=self.wire,
            options=self.options,
        )


def _cached(lock: Lock, kept: OrderedDict[str, T], key: str, build: Callable[[], T]) -> T:
    """The entry of a key, built where it is missing; the last used `PLANS_KEPT` are kept."""
    with lock:
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
    made = build()
    with lock:
        made = kept.setdefault(key, made)
        while len(kept) > PLANS_KEPT:
            kept.popitem(last=False)
    return made

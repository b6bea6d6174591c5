"""`ContextParallel`: a group of ranks that share sequences; makes and caches plans."""

import os
from collections import OrderedDict
from datetime import timedelta
from threading import Lock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn import checks, choice, planner
from ringattn.arena import Arena
from ringattn.cost import Cluster, peak_bytes
from ringattn.errors import UserError
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.methods.common import Problem
from ringattn.parallel.fabric import Fabric, ProcessGroupFabric, backend_of
from ringattn.parallel.staged import StagedFabric, check_staging
from ringattn.parallel.topology import ranks_per_node as launcher_ranks_per_node
from ringattn.plan import Plan, Settings

PLANS_KEPT = 64


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
        self.group, self.world, self.rank = _resolve(group)
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
        check_staging(staged, self.group)
        self.staged = staged
        self.arena = Arena()
        self._fabrics: dict[str, Fabric] = {}
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._lock = Lock()

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

    def plan(self, mask: Mask) -> Plan:
        """The plan for a mask. Cached; pure host work, so a data loader's thread may call it.

        Raises:
            UserError: the layout does not fit the mask, or the plan needs more than `memory_limit`.
        """
        checks.is_mask(mask)
        mask.head_counts(self.heads[0])  # refuses head groups that do not fit
        with self._lock:
            found = self._plans.get(mask.key)
            if found is not None:
                self._plans.move_to_end(mask.key)
                return found
        plan = self._build(mask)
        with self._lock:
            plan = self._plans.setdefault(mask.key, plan)
            while len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        return plan

    def compare(self, mask: Mask, *, exhaustive: bool = False) -> planner.Comparison:
        """Prices the candidates for a mask on the cluster, fastest first. Pure host work.

        Args:
            mask: what is attended.
            exhaustive: price those too that cannot win; the choice is the same.

        Raises:
            UserError: there is no cluster, or no candidate fits `memory_limit`.
        """
        checks.is_mask(mask)
        mask.head_counts(self.heads[0])  # refuses head groups that do not fit
        if self.cluster is None:
            raise UserError("cluster=None", "prices need a cluster", 'pass e.g. cluster="h100_sxm"')
        kernel = self.kernel if self.kernel in self.cluster.kernels else None
        return planner.compare(
            mask,
            self.world,
            self.ranks_per_node,
            self.layout,
            self.method,
            self._problem,
            planner.Terms(
                cluster=self.cluster,
                kernel=kernel,
                memory_limit=self.memory_limit,
                any_wire=self.any_wire,
                layout_options=tuple(self.layout_options.items()),
                refine=self.refine,
            ),
            exhaustive=exhaustive,
        )

    def _build(self, mask: Mask) -> Plan:
        if self.cluster is not None and self._is_open():
            return self.plan_of(mask, self.compare(mask).best)
        layout, method, schedules = choice.choose(
            mask,
            self.world,
            self.ranks_per_node,
            self.layout,
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
        return plan

    def plan_of(self, mask: Mask, quote: planner.Quote) -> Plan:
        """The plan of one of the candidates that `compare` priced for a mask. Not cached."""
        candidate = quote.candidate
        settings = Settings(dict(candidate.options), candidate.wire)
        return Plan(self, mask, quote.layout, candidate.method, quote.schedules, settings)

    def problem(self, mask: Mask, like: Plan) -> Problem:
        """A mask posed on the layout of a plan, with the settings of its method. Host work."""
        settings = like.settings
        options = self.options if settings.options is None else settings.options
        return self._problem(mask, like.layout).with_options(options, settings.wire)

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


def _resolve(
    group: "DeviceMesh | dist.ProcessGroup | int | None",
) -> tuple[dist.ProcessGroup | None, int, int]:
    """(process group, world, rank) of whatever stands for the group."""
    if isinstance(group, bool) or (isinstance(group, int) and group < 1):
        raise UserError(f"group={group!r}", "must be >= 1 simulated ranks", "pass e.g. 8")
    if isinstance(group, int):
        return None, group, 0
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise UserError(
                f"mesh with axes {group.mesh_dim_names}",
                "context parallelism needs a mesh of one axis",
                'pass a slice, e.g. mesh["cp"]',
            )
        group = group.get_group()
    if not dist.is_initialized():
        raise UserError(
            "group=None",
            "torch.distributed is not initialised",
            "call init_process_group first, or pass a number of simulated ranks",
        )
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise UserError(
            f"group={group!r}", "must be a DeviceMesh or a ProcessGroup of this rank", "pass one"
        )
    return group, dist.get_world_size(group), dist.get_rank(group)

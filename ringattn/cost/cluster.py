"""Cluster descriptions: what a plan's price depends on beside the plan.

Every figure is an achieved one, not a data-sheet peak. Units are in the names: `_tflops` is 1e12
floating-point operations per second, `_gbs` is 1e9 bytes per second and direction, `_us` is 1e-6
seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ringattn.errors import UserError
from ringattn.schedule import Direction


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How fast a kernel runs one direction: an efficiency curve over tile shapes.

    A tile of `a` pairs, rounded up to blocks, with r rows and c keys takes, per head,
    (a + row_pairs * r + key_pairs * c) * FLOPs per pair / tflops.

    Attributes:
        tflops: rate on large tiles; masked pairs of a block count as work.
        block_rows, block_keys: the kernel's block; edges are rounded up to it.
        row_pairs, key_pairs: fixed cost of a block row and of a key, in pairs.
        tile_us: cost of a tile in a launch. launch_us: cost of a launch.
        tail: share of the longest block's time that a launch ends with, while other cores idle.
        result_bytes: memory traffic per element of a result when a launch adds to an existing one.
        cut: name of a kernel that cuts tiles into calls of an operator, which are then counted as
            it makes them (`ringattn.cost.cut_load`); "" counts blocks. With it pairs, rows and keys
            are those of calls, `tile_us` is the cost of a call, and blocks and tail mean nothing.
        mask_ns: of an element of a mask that a call is given; with `cut`.
        matrix_tflops, matrix_us: rate of block matrices' products, 0 for `tflops`, and the cost of
            a product; with `cut`.
    """

    tflops: float
    block_rows: int = 128
    block_keys: int = 128
    row_pairs: float = 0.0
    key_pairs: float = 0.0
    tile_us: float = 0.0
    launch_us: float = 0.0
    tail: float = 0.0
    result_bytes: float = 0.0
    cut: str = ""
    mask_ns: float = 0.0
    matrix_tflops: float = 0.0
    matrix_us: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A local attention kernel: one curve per direction."""

    forward: Curve
    backward: Curve

    def curve(self, direction: Direction) -> Curve:
        """The curve of one direction."""
        return self.forward if direction == "forward" else self.backward


@dataclass(frozen=True, kw_only=True)
class Link:
    """What carries messages.

    Attributes:
        gbs: achieved bandwidth per direction: of one rank inside a node, of one NIC between nodes.
        latency_us: from posting a batch to its first byte. message_us: per further message.
    """

    gbs: float
    latency_us: float = 0.0
    message_us: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OnCores:
    """What ranks pay that compute, copy and send with the CPU cores of their node.

    All times are CPU time of one core. What runs at once shares the cores evenly: a rank's own
    thread, and one more per rank that carries its messages.

    Attributes:
        cores: of a node, for all of its ranks.
        run_us, run_gbs: of beginning a direction, and of the accumulators that it makes.
        step_us: of a step. message_us: of posting a message and waiting for it, at either end.
        part_us: of a run of rows and heads that is copied or added.
        copy_gbs: payload bytes that are packed, or written where they land. add_gbs: payload bytes
            that are added or merged where they land.
        carry_gbs, carry_us: bytes of a message that either end carries, and of a message.
    """

    cores: int
    run_us: float = 0.0
    run_gbs: float = 10.0
    step_us: float = 0.0
    message_us: float = 0.0
    part_us: float = 0.0
    copy_gbs: float = 5.0
    add_gbs: float = 3.0
    carry_gbs: float = 2.0
    carry_us: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of equal nodes.

    Attributes:
        name: for people. source: where the figures come from.
        peak_tflops: data-sheet peak of one rank in the input dtype; a bound for the curves.
        ranks_per_node, nics_per_node: ranks of a node share its NICs evenly.
        memory_gib: of one rank. memory_gbs: achieved bandwidth of copies and merges.
        cores: blocks of a kernel that run at once.
        gemm_share: share of the peak that large matrix products achieve.
        host_gbs: copies between one rank and host memory, per direction.
        host_gib, host_memory_gbs: host memory and its bandwidth, one rank's share of the node's.
        intra, inter: links inside a node and between nodes.
        overlap_tax: share of a kernel's speed that transfers beside it take away.
        jitter: relative standard deviation of a rank's kernel time.
        kernel: name of the kernel that plans are priced with. kernels: all that are known.
        on_cores: of ranks that share CPU cores; None for ranks with devices of their own. With it,
            messages inside a node cost what carrying them costs, and `intra` its latency alone.
    """

    name: str
    source: str = ""
    peak_tflops: float
    ranks_per_node: int
    nics_per_node: int
    memory_gib: float
    memory_gbs: float
    cores: int
    intra: Link
    inter: Link
    gemm_share: float = 0.7
    host_gbs: float = 50.0
    host_gib: float = 240.0
    host_memory_gbs: float = 40.0
    overlap_tax: float = 0.0
    jitter: float = 0.0
    kernel: str
    kernels: Mapping[str, Kernel]
    on_cores: OnCores | None = None

    def __post_init__(self) -> None:
        if self.kernel not in self.kernels:
            raise UserError(
                f"cluster {self.name}: kernel={self.kernel}",
                f"must be one of {', '.join(self.kernels)}",
                "name a kernel that the file describes",
            )
        parts = [("", self), ("intra.", self.intra), ("inter.", self.inter)]
        for name, kernel in self.kernels.items():
            parts += [(f"{name}.{d}.", kernel.curve(d)) for d in ("forward", "backward")]
        if self.on_cores is not None:
            parts.append(("on_cores.", self.on_cores))
        for prefix, part in parts:
            _check(f"cluster {self.name}: {prefix}", part)

    def kernel_named(self, name: str | None) -> Kernel:
        """The kernel of that name, or the default one."""
        if name is not None and name not in self.kernels:
            raise UserError(
                f"kernel={name!r}", f"must be one of {', '.join(self.kernels)}", "pick one"
            )
        return self.kernels[name or self.kernel]


_POSITIVE = {
    "gbs", "tflops", "peak_tflops", "memory_gib", "memory_gbs", "cores", "ranks_per_node",
    "nics_per_node", "block_rows", "block_keys", "gemm_share", "host_gbs", "host_gib",
    "host_memory_gbs", "run_gbs", "copy_gbs", "add_gbs", "carry_gbs",
}  # fmt: skip


def _check(where: str, part: object) -> None:
    """Raises UserError for a figure that cannot be one."""
    for entry in fields(part):  # type: ignore[arg-type]
        value = getattr(part, entry.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        positive = entry.name in _POSITIVE
        if not value >= 0 or (positive and value == 0):
            rule = "must be greater than 0" if positive else "must be at least 0"
            raise UserError(f"{where}{entry.name}={value}", rule, "correct the figure")

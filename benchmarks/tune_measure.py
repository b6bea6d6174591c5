"""Runs one part of the band kernel with given block sizes: holds it to the matmul kernel, times it.

One rank, whole tensors, float32 accumulators, as the executor calls the kernel. The backward's lse
and delta are drawn, not computed: gradients follow from whatever they are given, so that a fault of
the forward stays its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

import ringattn as ra
from ringattn.benchmarks.kernel_masks import mask_named
from ringattn.benchmarks.kernel_measure import WRONG, timed_passes
from ringattn.kernels import MatmulKernel
from ringattn.kernels.triton_band import FEW_PROGRAMS, processors, statistics
from ringattn.kernels.triton_configs import BlockConfig, Part
from ringattn.kernels.triton_launch import launch
from ringattn.kernels.triton_tiles import TritonTiles
from ringattn.kernels.work_lists import WorkList
from ringattn.plan import Plan
from ringattn.schedule import Direction

RUNS = ("causal", "documents_causal_4k", "window_causal")
LISTS = ("blocks_uniform", "blocks_variable")
"""Masks: long runs, runs of a few blocks, runs cut on both sides; and blocks that are listed."""

PRODUCTS = {"forward": 2, "keys": 5, "keys_only": 4, "queries": 3}  # of each pair of rows
OUTPUTS: dict[Part, tuple[str, ...]] = {
    "forward": ("out", "lse"),
    "keys": ("dq", "dk", "dv"),
    "keys_only": ("dk", "dv"),
    "queries": ("dq",),
}
CAP = 4.0


class WrongResult(Exception):
    """A configuration that computes something else than the matmul kernel."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Workbench:
    """Inputs and references of one head dim, dtype and softcap; all parts and configurations.

    seconds: of the repetitions of one part on one mask. heads: queries', keys'.
    """

    device: torch.device
    head_dim: int
    dtype: torch.dtype
    softcap: float | None = None
    seq_len: int = 16384
    heads: tuple[int, int] = (32, 4)
    seconds: float = 0.05
    _kept: dict = field(default_factory=dict)

    def rate(self, part: Part, mask: str, config: BlockConfig) -> float:
        """Median TFLOP/s by exact area and the part's own products. Raises WrongResult."""
        run, reset, outputs = self._prepared(part, mask, config)
        reset()
        run()
        self._check(part, mask, outputs)
        timing = timed_passes(run, reset, self.device, self.seconds)
        return self._flops(part, mask) / float(np.median(timing.seconds)) / 1e12

    def _prepared(
        self, part: Part, mask: str, config: BlockConfig
    ) -> tuple[Callable[[], None], Callable[[], None], dict[str, torch.Tensor]]:
        """(run, reset, outputs by name)."""
        q, k, v, dout, lse, delta = self._inputs
        like = {"out": dout, "dq": q, "dk": k, "dv": v}
        new = {name: torch.zeros_like(x, dtype=torch.float32) for name, x in like.items()}
        new["lse"] = lse.clone()
        operands = (q, k, v, new["out"], new["lse"])
        if part != "forward":
            operands = (q, k, v, dout, statistics(lse, delta), new["dq"], new["dk"], new["dv"])
        if part == "queries":
            operands = operands[:6]
        outputs = {name: new[name] for name in OUTPUTS[part]}
        works, scale = self._works(part, mask, config), self.head_dim**-0.5

        def run() -> None:
            for work, shared in works:
                launch(part, work, operands, self._group, scale, self.softcap, shared=shared)

        def reset() -> None:
            for name, output in outputs.items():
                output.fill_(-torch.inf if name == "lse" else 0.0)

        return run, reset, outputs

    @property
    def _group(self) -> int:
        return self.heads[0] // self.heads[1]

    @cached_property
    def _inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, dout, and lse and delta of about the size that they have."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(heads: int, *dims: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            shape = (1, self.seq_len, heads, *dims)
            return torch.randn(shape, generator=generator, device=self.device, dtype=dtype)

        hq, hkv = self.heads
        q, k, v, dout = (normal(heads, self.head_dim) for heads in (hq, hkv, hkv, hq))
        lse = normal(hq, dtype=torch.float32).mul_(0.1).add_(float(np.log(self.seq_len)))
        return q, k, v, dout, lse, normal(hq, dtype=torch.float32)

    def _plan(self, mask: str, heads: tuple[int, int]) -> Plan:
        context = ra.ContextParallel(
            1, heads=heads, head_dim=self.head_dim, dtype=self.dtype, method="ring",
            layout="contiguous",
        )  # fmt: skip
        return context.plan(mask_named(mask, self.seq_len))

    def _tiles(self, mask: str, direction: Direction, kernel: str, heads: tuple[int, int]) -> list:
        """What the kernel prepared of the mask's one-rank plan, kept between configurations."""
        key = (mask, direction, kernel)
        if key not in self._kept:
            program = self._plan(mask, heads).program(direction, 0, kernel, self.device)
            launches = [launch for step in program.steps for launch in step.launches]
            self._kept[key] = [launch.prepared for launch in launches]
        return self._kept[key]

    def _works(self, part: Part, mask: str, config: BlockConfig) -> list[tuple[WorkList, bool]]:
        direction = "forward" if part == "forward" else "backward"
        tiles: list[TritonTiles] = self._tiles(mask, direction, "triton", self.heads)
        if part in ("forward", "queries"):
            return [(work, False) for t in tiles for work in t.queries((config, config))]
        few, alone = FEW_PROGRAMS * processors(self.device), part == "keys_only"
        return [work for t in tiles for work in t.keys((config, config), self._group, few, alone)]

    def _flops(self, part: Part, mask: str) -> float:
        pairs = mask_named(mask, self.seq_len).area * self.heads[0]
        return 2 * self.head_dim * PRODUCTS[part] * pairs

    def _check(self, part: Part, mask: str, outputs: dict[str, torch.Tensor]) -> None:
        """The last key head and its query heads against the matmul kernel."""
        allowed = WRONG[str(self.dtype).removeprefix("torch.")]
        wants = self._reference("forward" if part == "forward" else "backward", mask)
        for name, got in outputs.items():
            want = wants[name]
            got = got[:, :, -want.shape[2] :]
            inside = want.isfinite()
            if not torch.equal(inside, got.isfinite()):
                raise WrongResult(f"{mask}: {name} is not finite where it should be, or reversed")
            want, got = want[inside], got[inside]
            error = float((got - want).norm() / want.norm())
            if not error <= allowed:
                raise WrongResult(f"{mask}: {name} is off by {error:.2g}, relative")

    def _reference(self, direction: Direction, mask: str) -> dict[str, torch.Tensor]:
        key = ("reference", direction, mask)
        if key not in self._kept:
            self._kept[key] = self._by_matmul(direction, mask)
        return self._kept[key]

    def _by_matmul(self, direction: Direction, mask: str) -> dict[str, torch.Tensor]:
        group, kernel = self._group, MatmulKernel()
        q, k, v, dout, lse, delta = (
            x[:, :, -heads:] for x, heads in zip(self._inputs, (group, 1, 1, group, group, group))
        )
        like = {"out": dout, "dq": q, "dk": k, "dv": v}
        new = {name: torch.zeros_like(x, dtype=torch.float32) for name, x in like.items()}
        new["lse"] = torch.full_like(lse, -torch.inf)
        options = {"scale": self.head_dim**-0.5, "softcap": self.softcap}
        for tiles in self._tiles(mask, direction, "matmul", (group, 1)):
            if direction == "forward":
                kernel.forward(q, k, v, tiles, new["out"], new["lse"], **options)
            else:
                grads = new["dq"], new["dk"], new["dv"]
                kernel.backward(dout, q, k, v, lse, delta, tiles, *grads, **options)
        return new

"""Masks, layouts and inputs that the core's tests share.

A case is a dict: mask, layout, method, world, heads ("8:2") or group (query heads per key head, of
4 query heads), batch, kernel, and optionally node (ranks of a node). `method` may carry options
("direct:stages=3", short "direct:3"), `kernel` an extra ("matmul+softcap").
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import ringattn as ra
from ringattn import Layout, Mask, layouts, masks
from ringattn.kernels.reference import DenseAttention
from ringattn.methods import METHODS
from ringattn.methods.common import Problem
from ringattn.schedule import Shapes

Case = dict[str, Any]

HEADS = 4
HEAD_DIM = 8
DOCUMENTS = [7, 1, 12, 3, 38, 6]  # 67 tokens, so that equal shares do not exist
TREE = [-1, 0, 0, 1, -1, 4]
STRIDED_BANDS = [(1, 40, 2, 40, -9, 9, 3), (2, 40, 0, 40, -20, 10, 6), (41, 50, 0, 50, -60, 0, 1)]

BAND_MASKS: dict[str, Callable[[], Mask]] = {
    "full": lambda: masks.full(61),
    "causal": lambda: masks.causal(64),
    "window": lambda: masks.sliding_window(61, 7, 2),
    "causal_window": lambda: masks.sliding_window(64, 9, 0),
    "documents": lambda: masks.documents(DOCUMENTS, causal=False),
    "documents_causal": lambda: masks.documents(DOCUMENTS, causal=True),
    "shared_question": lambda: masks.shared_question(DOCUMENTS),
    "global_sliding": lambda: masks.global_sliding(61, 4),
    "causal_blockwise": lambda: masks.causal_blockwise(DOCUMENTS),
    "prefix_lm": lambda: masks.prefix_lm(64, 11),
    "prefix_lm_documents": lambda: masks.prefix_lm_documents(DOCUMENTS, 4),
    "block_causal_documents": lambda: masks.block_causal_documents(DOCUMENTS, 5),
    "streaming": lambda: masks.streaming(61, 3, 7),
    "dual_scope": lambda: masks.dual_scope(64, 8, 3, 5),
    "neighborhood_1d": lambda: masks.neighborhood((64,), 4, dilation=3, stride=2),
    "neighborhood_2d": lambda: masks.neighborhood((8, 8), (3, 5)),
    "neighborhood_3d": lambda: masks.neighborhood(
        (3, 3, 5), (2, 3, 3), causal=(True, False, False)
    ),
    "neighborhood_blocked": lambda: masks.neighborhood((8, 8), 4, stride=4),
    "neighborhood_tiled": lambda: masks.neighborhood((6, 8), (5, 4), stride=(3, 4), tile=(3, 2)),
    "prefix_tree": lambda: masks.prefix_tree(DOCUMENTS, TREE),
    "strided_bands": lambda: masks.from_bands(64, STRIDED_BANDS),  # some rows attend nothing
}
# Heads that differ, block matrices, and blocks selected at run time.
HEAD_MASKS: dict[str, Callable[[], Mask]] = {
    "per_head": lambda: masks.per_head(
        [
            (1, masks.causal(61)),
            (2, masks.streaming(61, 3, 7)),
            (1, masks.documents([40, 21], False)),
        ]
    ),
    "blocks": lambda: masks.blocks(_matrix(8, 7), 8, [3, 14, 9, 1, 20, 10, 7]),
    "block_groups": lambda: masks.blocks(_matrix(2, 8, 8), 8, 8, within=masks.causal(61)),
    "per_head_blocks": lambda: masks.per_head(
        [(2, masks.causal(64)), (2, masks.blocks(_matrix(2, 5, 8), [9, 20, 3, 31, 1], 8))]
    ),
    "routed": lambda: masks.routed(masks.causal(61), block_k=5, top_k=4),
    "routed_per_head": lambda: masks.routed(
        masks.documents(DOCUMENTS, causal=True), block_q=8, block_k=4, top_k=3, per_head=True
    ),
}

MASKS = BAND_MASKS | HEAD_MASKS


def _matrix(*shape: int) -> np.ndarray:
    """Two blocks in five allowed, the same ones every time."""
    return np.random.default_rng(0).random(shape) < 0.4


def _uneven(mask: Mask, world: int) -> Layout:
    return layouts.contiguous(
        mask.seq_len, world, [mask.seq_len - 5 * (world - 1)] + [5] * (world - 1)
    )


def _zero_tokens(mask: Mask, world: int) -> Layout:
    """Rank 0 owns nothing (all, where it is alone)."""
    if world == 1:
        return layouts.contiguous(mask.seq_len, 1)
    share = np.diff(np.arange(world) * mask.seq_len // (world - 1))
    return layouts.contiguous(mask.seq_len, world, [0, *share.tolist()])


def _scattered(mask: Mask, world: int) -> Layout:
    """Runs of 1 to 9 tokens on random ranks, in random order within a rank."""
    rng = np.random.default_rng(mask.seq_len + world)
    cuts = np.unique([0, mask.seq_len, *np.cumsum(rng.integers(1, 10, mask.seq_len))])
    cuts = cuts[cuts <= mask.seq_len]
    rows = [(a, b, 1, int(rng.integers(world))) for a, b in pairwise(cuts.tolist())]
    return layouts.from_ranges(mask.seq_len, world, rng.permutation(rows), "scattered")


LAYOUTS: dict[str, Callable[[Mask, int], Layout]] = {
    "contiguous": lambda mask, world: layouts.contiguous(mask.seq_len, world),
    "zigzag": lambda mask, world: layouts.zigzag(mask.seq_len, world),
    "striped": lambda mask, world: layouts.striped(mask.seq_len, world),
    "striped_3": lambda mask, world: layouts.striped(mask.seq_len, world, 3),
    "area_greedy": lambda mask, world: layouts.area_greedy(mask, world),
    "uneven": _uneven,
    "zero_tokens": _zero_tokens,
    "scattered": _scattered,
}

NODE_LAYOUTS: dict[str, Callable[[Mask, int, int], Layout]] = {
    "node_balanced": layouts.node_balanced,
    "hybrid": layouts.hybrid,
}

METHOD_NAMES = [*METHODS, "direct:3", "direct:1:join=1"]
KERNELS = [
    "cpu_flash", "cpu_flash+sinks", "matmul", "matmul+sinks", "matmul+softcap", "matmul+dims",
]  # fmt: skip

AXES: dict[str, list] = {
    "mask": list(MASKS),
    "layout": list(LAYOUTS),
    "method": METHOD_NAMES,
    "world": [1, 2, 3, 4],
    "group": [1, 4],
    "batch": [1, 2],
    "kernel": KERNELS,
}


@cache
def mask_of(name: str) -> Mask:
    """The mask of that name; one object per process."""
    return MASKS[name]()


@dataclass(frozen=True)
class Inputs:
    """Whole-sequence inputs of a case: q, k, v, dout (B, S, heads, dim) and the call's extras."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    sinks: torch.Tensor | None
    softcap: float | None

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q, k, v, dout)."""
        return self.q, self.k, self.v, self.dout

    @property
    def extras(self) -> dict[str, Any]:
        """Keyword arguments of `attention`, `simulate` and `reference`."""
        return {"sinks": self.sinks, "softcap": self.softcap}


def inputs(seq_len: int, group: int, batch: int, kernel: str = "matmul", seed: int = 0) -> Inputs:
    """float64 inputs of 4 query heads, the same in every process."""
    return draw_inputs(seq_len, (HEADS, HEADS // group), batch, kernel, seed)


@lru_cache(maxsize=64)
def draw_inputs(
    seq_len: int, heads: tuple[int, int], batch: int, kernel: str = "matmul", seed: int = 0
) -> Inputs:
    """float64 inputs of (Hq, Hkv) heads, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    qk_dim, v_dim = head_dims(kernel)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return Inputs(
        q=draw(batch, seq_len, heads[0], qk_dim),
        k=draw(batch, seq_len, heads[1], qk_dim),
        v=draw(batch, seq_len, heads[1], v_dim),
        dout=draw(batch, seq_len, heads[0], v_dim),
        sinks=draw(heads[0]) if kernel.endswith("+sinks") else None,
        softcap=1.5 if kernel.endswith("+softcap") else None,
    )


def head_dims(kernel: str) -> tuple[int, int]:
    """(D of queries and keys, D of values)."""
    return (16, HEAD_DIM) if kernel.endswith("+dims") else (HEAD_DIM, HEAD_DIM)


def heads_of(case: Case) -> tuple[int, int]:
    """(Hq, Hkv) of a case."""
    if "heads" not in case:
        return HEADS, HEADS // case["group"]
    q_heads, kv_heads = case["heads"].split(":")
    return int(q_heads), int(kv_heads)


def fits_heads(case: Case) -> bool:
    """Whether the head groups of a case's mask make up its query heads."""
    try:
        mask_of(case["mask"]).head_counts(heads_of(case)[0])
    except ra.UserError:
        return False
    return True


def layout_of(case: Case) -> Layout:
    """The layout of a case."""
    mask, world, name = mask_of(case["mask"]), case["world"], case["layout"]
    if name in NODE_LAYOUTS:
        return NODE_LAYOUTS[name](mask, world, case.get("node", world))
    return LAYOUTS[name](mask, world)


def options_of(method: str) -> dict[str, int]:
    """The options after a method's name: "usp:u=2" or, for stages, "direct:3"."""
    pairs = (part.rpartition("=") for part in method.split(":")[1:])
    return {name or "stages": int(value) for name, _, value in pairs}


def inputs_of(case: Case) -> Inputs:
    """Inputs of a case."""
    seq_len = mask_of(case["mask"]).seq_len
    return draw_inputs(seq_len, heads_of(case), case["batch"], case["kernel"])


@lru_cache(maxsize=64)
def _reference(mask: str, heads: tuple[int, int], batch: int, extra: str) -> DenseAttention:
    x = draw_inputs(mask_of(mask).seq_len, heads, batch, extra)
    return ra.reference(x.q, x.k, x.v, mask_of(mask), x.dout, **x.extras)


def reference_of(case: Case) -> DenseAttention:
    """The dense float64 reference of a case."""
    extra = "matmul" + "".join(case["kernel"].partition("+")[1:])
    return _reference(case["mask"], heads_of(case), case["batch"], extra)


def context_of(case: Case, group: Any, **options: Any) -> ra.ContextParallel:
    """The context of a case over a group (or a number of simulated ranks)."""
    return ra.ContextParallel(
        group,
        heads=heads_of(case),
        head_dim=head_dims(case["kernel"]),
        dtype=options.pop("dtype", torch.float64),
        method=case["method"].partition(":")[0],
        layout=layout_of(case),
        kernel=case["kernel"].partition("+")[0],
        ranks_per_node=options.pop("ranks_per_node", case.get("node")),
        options=options_of(case["method"]) or None,
        **options,
    )


def plan_of(case: Case, group: Any = None, **options: Any) -> ra.Plan:
    """The plan of a case; over simulated ranks unless a group is given."""
    context = context_of(case, case["world"] if group is None else group, **options)
    return context.plan(mask_of(case["mask"]))


def problem(
    mask: Mask, layout: Layout, *, group: int = 1, method: str = "ring", **changes: Any
) -> Problem:
    """A planning problem with 4 query heads of dim 8 in bfloat16."""
    shapes = Shapes(
        q_heads=HEADS,
        kv_heads=HEADS // group,
        qk_dim=HEAD_DIM,
        v_dim=HEAD_DIM,
        itemsize=2,
        accumulator_itemsize=4,
    )
    settings: dict[str, Any] = {
        "mask": mask,
        "layout": layout,
        "shapes": shapes,
        "ranks_per_node": 2,
        "options": options_of(method),
    }
    return Problem(**(settings | changes))


def mixed(cases: list[Case]) -> list[Case]:
    """The cases in a fixed mixed order, so that a part of a grid is a sample of all of it."""
    return [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]

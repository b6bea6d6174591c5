"""Random cases of the whole attention that must work: all about one follows from its seed."""

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import ringattn as ra
from ringattn import layouts
from tests.core.fuzz_masks import Recipe, draw_length, draw_mask, draw_parts

DTYPES = {"float64": 0.4, "float32": 0.3, "bfloat16": 0.15, "float16": 0.15}
WORLDS = [1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 12, 16]
OPTIONS: dict[str, dict[str, list[int]]] = {
    "direct": {"stages": [1, 2, 3, 5], "join": [1], "by_heads": [1]},
    "tile": {"tile_a": []},
    "ulysses": {"u": [], "save": [1]},
    "usp": {"u": [], "save": [1]},
    "loongtrain": {"u": [], "save": [1], "context_first": [1]},
    "hybrid": {"u": [], "save": [1], "stages": [1, 2, 3], "slack": [1, 30, 100]},
}
"""Settings of methods; [] stands for a divisor of the ranks."""
PLAIN_METHODS = ("ring", "burst", "double_ring", "all_gather")
METHODS = (*PLAIN_METHODS, *OPTIONS, "auto")
LAYOUTS = (
    "contiguous", "zigzag", "striped", "area_greedy", "node_balanced", "hybrid", "auto", "uneven",
    "scattered", "dealt",
)  # fmt: skip
NODE_LAYOUTS = ("node_balanced", "hybrid")
MOST_TILES = 640  # tokens times ranks, which the number of tiles grows with
CLUSTERS = ("h100_sxm", "cpu_gloo")


@dataclass(frozen=True, kw_only=True)
class FuzzCase:
    """One case.

    Attributes:
        seed: what everything else follows from.
        mask: takes no argument; layout: a name, or takes the mask's tokens.
        world, node: ranks, and ranks of a node (None: the default).
        heads, head_dim: as of `ContextParallel`.
        options, layout_options, cluster, kernel: likewise.
        dtype, wire: names of torch dtypes; wire may also be None or "auto".
        scale, softcap: of the call; sinks: whether there are any.
        batch: sequences of the call.
    """

    seed: int
    mask: Recipe
    layout: str | Recipe
    method: str
    world: int
    node: int | None
    heads: tuple[int, int]
    head_dim: tuple[int, int]
    dtype: str
    kernel: str
    batch: int
    options: dict[str, int] = field(default_factory=dict)
    layout_options: dict[str, int | float] = field(default_factory=dict)
    cluster: str | None = None
    wire: str | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def values(self) -> dict[str, Any]:
        """The case for a journal: its seed, and what outcomes are counted by."""
        return {
            "seed": self.seed,
            "mask": self.mask.kind,
            "layout": self.layout if isinstance(self.layout, str) else self.layout.kind,
            "method": self.method,
            "world": self.world,
            "heads": f"{self.heads[0]}:{self.heads[1]}",
            "dtype": self.dtype,
        }

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        texts = {k: v.text if isinstance(v, Recipe) else v for k, v in shown.items()}
        return ", ".join(f"{k}={v}" for k, v in texts.items() if v not in (None, {}, False))


def pick(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def draw_sound(seed: int, rng: np.random.Generator) -> FuzzCase:
    """A case that must work."""
    world, kv_heads = pick(rng, WORLDS), pick(rng, [1, 1, 2, 2, 3, 4])
    q_heads = kv_heads * pick(rng, [1, 1, 2, 3, 4, 8] if kv_heads < 3 else [1, 2, 3])
    tokens = draw_length(rng)
    mask = draw_mask(rng, q_heads, min(tokens, MOST_TILES // world))
    method, layout = pick(rng, METHODS), pick(rng, LAYOUTS)
    if method == "ulysses" and world > q_heads:
        world = pick(rng, range(1, q_heads + 1))
    node = pick(rng, divisors(world))
    if layout not in NODE_LAYOUTS and rng.random() < 0.2:
        node = pick(rng, [None, int(rng.integers(1, world + 2))])
    cluster = pick(rng, CLUSTERS) if rng.random() < 0.12 else None
    options = _draw_options(rng, method, world, q_heads)
    dims = pick(rng, [1, 2, 3, 5, 8, 8, 8, 16, 17, 32]), pick(rng, [1, 4, 8, 13, 24])
    differ, capped = bool(rng.random() < 0.3), bool(rng.random() < 0.2)
    dtype = str(rng.choice(list(DTYPES), p=list(DTYPES.values())))
    accumulator = "float64" if dtype == "float64" else "float32"
    wires = [None, None, accumulator, dtype, "auto" if cluster else dtype]
    kernels = ["auto", "matmul"] if differ or capped else ["auto", "matmul", "cpu_flash"]
    return FuzzCase(
        seed=seed,
        mask=mask,
        layout=_draw_layout(rng, layout, seed),
        method=method,
        world=world,
        node=node,
        heads=(q_heads, kv_heads),
        head_dim=dims if differ else (dims[0], dims[0]),
        dtype=dtype,
        kernel=pick(rng, kernels),
        batch=0 if rng.random() < 0.03 else pick(rng, [1, 1, 1, 2, 2, 3]),
        options=options,
        layout_options=_draw_layout_options(rng, layout, node),
        cluster=cluster,
        wire=pick(rng, wires),
        scale=pick(rng, [None, None, None, 0.3, 1.0, -0.5]),
        softcap=pick(rng, [0.5, 1.5, 30.0]) if capped else None,
        sinks=bool(rng.random() < 0.25),
    )


def _draw_options(
    rng: np.random.Generator, method: str, world: int, q_heads: int
) -> dict[str, int]:
    options: dict[str, int] = {}
    for name, values in OPTIONS.get(method, {}).items():
        if rng.random() < 0.4:
            most = q_heads if name == "u" else world
            options[name] = pick(rng, values or [d for d in divisors(world) if d <= most])
    return options


def _draw_layout_options(
    rng: np.random.Generator, layout: str, node: int | None
) -> dict[str, int | float]:
    known: dict[str, Any] = {}
    if layout == "striped":
        known = {"stride": pick(rng, [1, 2, 3, 7, 40])}
    elif layout == "area_greedy":
        known = {"chunk": pick(rng, [1, 3, 8, 50])}
    elif layout in NODE_LAYOUTS:
        assert node is not None
        known = {
            "chunk": pick(rng, [1, 4, 9, 60]),
            "group": pick(rng, divisors(node)),
            "max_imbalance": pick(rng, [1.0, 1.1, 1.7]),
        }
    return {name: value for name, value in known.items() if rng.random() < 0.4}


def _draw_layout(rng: np.random.Generator, name: str, seed: int) -> str | Recipe:
    """A name that the library knows, or what makes a layout of the mask's tokens and the ranks."""
    if name not in ("uneven", "scattered", "dealt"):
        return name
    stride = pick(rng, [2, 3, 5])

    def build(tokens: int, world: int) -> ra.Layout:
        own = np.random.default_rng([seed, 7])
        if name == "uneven":
            cuts = np.sort(own.integers(0, tokens + 1, world - 1))
            return layouts.contiguous(tokens, world, np.diff([0, *cuts, tokens]).tolist())
        if name == "dealt":  # each residue of the token is one rank's
            rows = [(s, tokens, stride, int(own.integers(world))) for s in range(stride)]
            rows = [row for row in rows if row[0] < tokens]
        else:
            edges = np.cumsum([0, *draw_parts(own, tokens)]).tolist()
            rows = [(a, b, 1, int(own.integers(world))) for a, b in pairwise(edges)]
        order = own.permutation(len(rows))
        return layouts.from_ranges(tokens, world, [rows[i] for i in order], name)

    return Recipe(name, f"{name}{f' of stride {stride}' if name == 'dealt' else ''}", build)


def torch_dtype(name: str | None) -> Any:
    """The torch dtype of a name; None and "auto" as they are."""
    return name if name in (None, "auto") else getattr(torch, name)

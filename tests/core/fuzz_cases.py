"""Random cases of the whole attention: everything about one follows from its seed.

One case in twelve gets something that the library must refuse; `rules_broken` decides by rules of
its own which refusals a case must meet, so that any other refusal is a failure.
"""

from dataclasses import replace

import numpy as np

import ringattn as ra
from ringattn import layouts
from tests.core.fuzz_masks import Recipe, draw_length, draw_parts
from tests.core.fuzz_sound import NODE_LAYOUTS, OPTIONS, FuzzCase, draw_sound, pick

FLAWED = 1 / 12


def draw_case(seed: int) -> FuzzCase:
    """The case of a seed."""
    rng = np.random.default_rng([seed, 6])
    case = draw_sound(seed, rng)
    return _FLAWS[int(rng.integers(len(_FLAWS)))](case, rng) if rng.random() < FLAWED else case


def rules_broken(case: FuzzCase) -> list[str]:
    """Patterns of the refusals that a case may meet, one per rule that it breaks; none: it works.

    A case that breaks several meets any of them.
    """
    (q_heads, kv_heads), world, node = case.heads, case.world, case.node or case.world
    options, broken = case.options, []

    def rule(breaks: bool, pattern: str) -> None:
        if breaks:
            broken.append(pattern)

    degree = options.get("u", world if case.method == "ulysses" else 1)
    pooled = case.method in ("ulysses", "usp", "loongtrain", "hybrid")
    known = {name for m, o in OPTIONS.items() for name in o if case.method in (m, "auto")}
    given = "" if isinstance(case.layout, str) else case.layout.kind
    accumulator = "float64" if case.dtype == "float64" else "float32"
    rule("empty" in case.mask.kind, r"^lengths=.*positive integers")
    rule("other heads" in case.mask.kind, r"^mask .* with head groups .* query heads")
    rule(q_heads % kv_heads != 0, r"^heads=.*multiple")
    rule(max(case.head_dim) > 256, r"^head_dim=.*256")
    rule(pooled and (world % degree != 0 or degree > q_heads), r"^head-parallel degree u=")
    rule(world % options.get("tile_a", 1) != 0, r"^tile_a=.*must divide")
    rule(not set(options) <= known, r"^options=.*has (the options|none)")
    rule(any(value < 1 for value in options.values()), r"=-?\d+: must be a positive integer")
    rule(case.layout in NODE_LAYOUTS and world % node != 0, r"^layout=.*needs whole nodes")
    rule("group" in case.layout_options and node % case.layout_options["group"] != 0, r"^group=")
    rule(given == "other ranks", r"^layout for \d+ ranks")
    rule(given == "other tokens", r"^layout for \d+ tokens")
    rule(case.wire not in (None, "auto", accumulator, case.dtype), r"^wire_dtype=")
    rule(case.wire == "auto" and case.cluster is None, r"^wire_dtype='auto'.*needs a cluster")
    rule(case.scale == 0, r"^scale=0")
    rule(case.softcap is not None and case.softcap <= 0, r"^softcap=")
    flash = case.kernel == "cpu_flash"
    rule(flash and case.head_dim[0] != case.head_dim[1], r"^kernel=cpu_flash: head dims")
    rule(flash and bool(case.softcap), r"^kernel=cpu_flash: softcap")
    return broken


def _flaw_mask(case: FuzzCase, rng: np.random.Generator) -> FuzzCase:
    """An empty document, or head groups of another model."""
    tokens = draw_length(rng)
    if rng.random() < 0.5:
        lengths = [*draw_parts(rng, tokens), 0]
        build = Recipe("empty documents", f"{lengths}", lambda: ra.masks.documents(lengths, True))
        return replace(case, mask=build)
    count = case.heads[0] + int(rng.integers(1, 3))

    def groups() -> ra.Mask:
        return ra.masks.per_head([(count - 1, ra.masks.full(tokens)), (1, ra.masks.causal(tokens))])

    return replace(case, mask=Recipe("per_head of other heads", f"{count} heads", groups))


def _flaw_shape(case: FuzzCase, rng: np.random.Generator) -> FuzzCase:
    kind = int(rng.integers(3))
    if kind == 0:
        return replace(case, heads=(case.heads[0], case.heads[0] + 1))
    if kind == 1:
        return replace(case, head_dim=(257, case.head_dim[1]), kernel="matmul")
    return replace(case, head_dim=(8, 16), kernel="cpu_flash", softcap=None)


def _flaw_method(case: FuzzCase, rng: np.random.Generator) -> FuzzCase:
    kind = int(rng.integers(4))
    if kind == 0:
        method = pick(rng, ["ulysses", "usp", "loongtrain", "hybrid"])
        return replace(case, method=method, options={"u": case.world + 1})
    if kind == 1:
        return replace(case, method="tile", options={"tile_a": case.world + 1})
    if kind == 2:
        return replace(case, method="ring", options={"stages": 2})
    return replace(case, method="direct", options={"stages": -int(rng.integers(1, 3))})


def _flaw_layout(case: FuzzCase, rng: np.random.Generator) -> FuzzCase:
    kind = int(rng.integers(4))
    if kind == 0:
        return replace(case, layout=pick(rng, NODE_LAYOUTS), layout_options={}, node=case.world + 1)
    if kind == 1:
        settings: dict[str, int | float] = {"group": case.world + 1}
        return replace(case, layout="hybrid", layout_options=settings, node=case.world)
    more, less = (1, 0) if kind == 2 else (0, 1)
    name = "other ranks" if kind == 2 else "other tokens"

    def build(tokens: int, world: int) -> ra.Layout:
        return layouts.contiguous(tokens + less, world + more)

    return replace(case, layout=Recipe(name, name, build), layout_options={})


def _flaw_call(case: FuzzCase, rng: np.random.Generator) -> FuzzCase:
    kind = int(rng.integers(4))
    if kind == 0:
        return replace(case, scale=0.0)
    if kind == 1:
        return replace(case, softcap=-1.5, kernel="matmul")
    if kind == 2:
        return replace(case, wire="bfloat16" if case.dtype != "bfloat16" else "float16")
    return replace(case, wire="auto", cluster=None)


_FLAWS = (_flaw_mask, _flaw_shape, _flaw_method, _flaw_layout, _flaw_call)

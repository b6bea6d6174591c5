"""Plan generators, one file each: a problem in, a forward and a backward schedule out."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from ringattn.errors import UserError
from ringattn.methods import (
    all_gather,
    burst,
    direct,
    double_ring,
    hybrid,
    loongtrain,
    ring,
    tile,
    ulysses,
    usp,
)
from ringattn.methods.common import Problem
from ringattn.methods.head_groups import per_head_group
from ringattn.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """A plan generator: `forward(problem)` and `backward(problem)` return schedules.

    `options` names the settings of `Problem.options` that it reads.
    """

    forward: Callable[[Problem], Schedule]
    backward: Callable[[Problem], Schedule]
    options: tuple[str, ...] = ()


def _flat(module: ModuleType, *options: str) -> Method:
    """A method that plans for all heads alike, made to plan each head group by itself."""
    return Method(per_head_group(module.forward), per_head_group(module.backward), options)


METHODS = {
    "ring": _flat(ring),
    "burst": _flat(burst),
    "double_ring": _flat(double_ring),
    "all_gather": _flat(all_gather),
    "direct": _flat(direct, "stages", "join", "by_heads"),
    "tile": _flat(tile, "tile_a"),
    "ulysses": Method(ulysses.forward, ulysses.backward, ("u", "save")),
    "usp": Method(usp.forward, usp.backward, ("u", "save")),
    "loongtrain": Method(loongtrain.forward, loongtrain.backward, ("u", "context_first", "save")),
    "hybrid": Method(hybrid.forward, hybrid.backward, ("u", "stages", "slack", "save")),
}


def by_name(name: str) -> Method:
    """The plan generator of that name."""
    if name not in METHODS:
        raise UserError(
            f"method={name!r}", f"must be one of {', '.join(METHODS)}, auto", "pick one"
        )
    return METHODS[name]

"""Plan generators, one file each: a problem in, a forward and a backward schedule out."""

from collections.abc import Callable
from dataclasses import dataclass

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
from ringattn.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """A plan generator: `forward(problem)` and `backward(problem)` return schedules.

    `options` names the settings of `Problem.options` that it reads.
    """

    forward: Callable[[Problem], Schedule]
    backward: Callable[[Problem], Schedule]
    options: tuple[str, ...] = ()


METHODS = {
    "ring": Method(ring.forward, ring.backward),
    "burst": Method(burst.forward, burst.backward),
    "double_ring": Method(double_ring.forward, double_ring.backward),
    "all_gather": Method(all_gather.forward, all_gather.backward),
    "direct": Method(direct.forward, direct.backward, ("stages", "join", "by_heads")),
    "tile": Method(tile.forward, tile.backward, ("tile_a",)),
    "ulysses": Method(ulysses.forward, ulysses.backward, ("u",)),
    "usp": Method(usp.forward, usp.backward, ("u",)),
    "loongtrain": Method(loongtrain.forward, loongtrain.backward, ("u", "context_first")),
    "hybrid": Method(hybrid.forward, hybrid.backward, ("u", "stages", "slack")),
}


def by_name(name: str) -> Method:
    """The plan generator of that name."""
    if name not in METHODS:
        raise UserError(
            f"method={name!r}", f"must be one of {', '.join(METHODS)}, auto", "pick one"
        )
    return METHODS[name]

"""Plan generators, one file each: a problem in, a forward and a backward schedule out."""

from collections.abc import Callable
from dataclasses import dataclass

from ringattn.errors import UserError
from ringattn.methods import direct, ring
from ringattn.methods.common import Problem
from ringattn.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """A plan generator: `forward(problem)` and `backward(problem)` return schedules."""

    forward: Callable[[Problem], Schedule]
    backward: Callable[[Problem], Schedule]


METHODS = {
    "ring": Method(ring.forward, ring.backward),
    "direct": Method(direct.forward, direct.backward),
}


def by_name(name: str) -> Method:
    """The plan generator of that name."""
    if name not in METHODS:
        raise UserError(
            f"method={name!r}", f"must be one of {', '.join(METHODS)}, auto", "pick one"
        )
    return METHODS[name]

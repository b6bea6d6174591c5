"""Ulysses: all ranks share the heads; tokens are pooled, and attention is local.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). The cost formula is in `ringattn.methods.heads`, with
U = P and no inner bytes. The option "u" gives a smaller degree, with the KV ring inside.
"""

from ringattn.methods import ring
from ringattn.methods.common import Problem
from ringattn.methods.heads import compose
from ringattn.schedule import Schedule


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    degree = problem.options.get("u", problem.world)
    return compose(problem, "forward", "ulysses", ring.forward, degree)


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    degree = problem.options.get("u", problem.world)
    return compose(problem, "backward", "ulysses", ring.backward, degree)

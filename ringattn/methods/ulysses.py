"""Ulysses: all ranks share the heads; tokens are pooled, and attention is local.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Bytes received per rank for equal shards and U = P
dividing Hkv: forward ((U-1)/U) [2 u (Hq + Hkv) e + 4 n Hq], backward
((U-1)/U) [u (Hq (2e + g) + 2 Hkv (e + g)) + 8 n Hq]; with the option "save" the backward is
((U-1)/U) [u (Hq (e + g) + 2 Hkv g) + 8 n Hq]. The option "u" gives a smaller degree, with the KV
ring inside. See `ringattn.methods.heads` for U > Hkv and uneven heads.
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

"""Burst: the forward is the KV ring; in the backward the query side circulates.

Source: BurstAttention (arXiv 2403.09347), section 3: Q, dO, lse and delta circulate, dQ follows one
step behind; K, V, dK and dV stay. Bytes received per rank for equal shards and a full mask: forward
as the KV ring, backward (P-1) [u Hq (2e + g) + 8 n Hq], less than the ring only if Hq / Hkv is
below 4/3 (g = 2) or 1.5 (g = 4).
"""

from ringattn.methods.common import Problem
from ringattn.methods.rotation import rotate
from ringattn.schedule import Channel, Schedule


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    return rotate(problem, "forward", Channel.K, "burst")


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    return rotate(problem, "backward", Channel.Q, "burst")

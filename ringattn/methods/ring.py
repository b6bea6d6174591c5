"""KV ring: keys and values circulate, queries stay; in the backward dK and dV circulate too.

Source: Ring Attention (arXiv 2310.01889); the fused ring of zhuzilin/ring-flash-attention.
Bytes received per rank for equal shards and a full mask, u = n * D, P ranks, e bytes of K and V,
g bytes of a travelling gradient: forward 2 (P-1) u Hkv e, backward 2 (P-1) u Hkv (e + g).
"""

from ringattn.methods.common import Problem
from ringattn.methods.rotation import rotate
from ringattn.schedule import Channel, Schedule


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    return rotate(problem, "forward", Channel.K, "ring")


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    return rotate(problem, "backward", Channel.K, "ring")

"""USP: head parallelism inside a node, the KV ring between head groups.

Source: "USP: A Unified Sequence Parallelism Approach" (arXiv 2405.07719). Bytes received per rank
for equal shards, a full mask and U dividing Hkv: those of `ringattn.methods.ulysses` for U, and of
the ring of P / U groups on U n rows and Hkv / U heads: forward 2 (P/U - 1) u Hkv e, backward
2 (P/U - 1) u Hkv (e + g).
The option "u" is the head-parallel degree; by default the largest divisor of the ranks of a node
that is at most Hkv, so that no key head is replicated.
"""

from ringattn.methods import ring
from ringattn.methods.common import Problem
from ringattn.methods.heads import compose
from ringattn.schedule import Schedule


def default_degree(problem: Problem) -> int:
    """Largest degree that fits a node and the key heads."""
    limit = min(problem.ranks_per_node, problem.shapes.kv_heads)
    return max(u for u in range(1, limit + 1) if problem.world % u == 0)


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    degree = problem.options.get("u", 0) or default_degree(problem)
    return compose(problem, "forward", "usp", ring.forward, degree)


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    degree = problem.options.get("u", 0) or default_degree(problem)
    return compose(problem, "backward", "usp", ring.backward, degree)

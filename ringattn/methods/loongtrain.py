"""LoongTrain: head parallelism and a double ring, placed head-first or context-first.

Source: LoongTrain (arXiv 2406.18485), 2D-Attention with DoubleRing. Bytes received per rank as in
`ringattn.methods.usp`, with the double ring of P / U groups inside: its backward receives
2 (N-1) u Hkv g more where N windows of several groups cross nodes. The option "u" is the
head-parallel degree (default as for usp); "context_first" 1 puts the ranks of a ring next to each
other instead of those of a head group.
"""

from ringattn.methods import double_ring
from ringattn.methods.common import Problem
from ringattn.methods.heads import compose
from ringattn.methods.usp import default_degree
from ringattn.schedule import Schedule


def _heads_first(problem: Problem) -> bool:
    return not problem.options.get("context_first", 0)


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    degree = problem.options.get("u", 0) or default_degree(problem)
    return compose(
        problem, "forward", "loongtrain", double_ring.forward, degree,
        heads_first=_heads_first(problem),
    )  # fmt: skip


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    degree = problem.options.get("u", 0) or default_degree(problem)
    return compose(
        problem, "backward", "loongtrain", double_ring.backward, degree,
        heads_first=_heads_first(problem),
    )  # fmt: skip

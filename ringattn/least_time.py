"""Bounds of a candidate's time that need no plan: what is shared out by layout and method alone."""

import numpy as np

from ringattn.candidates import Candidate
from ringattn.cost import Cluster
from ringattn.cost.kernel_time import pair_flops
from ringattn.errors import UserError
from ringattn.methods.common import Problem
from ringattn.schedule import Channel, Direction, Wire

DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")
KEY_SIDE = ("ring", "direct", "double_ring", "all_gather")  # queries stay with their rank
_POOLING = ("usp", "ulysses", "loongtrain")  # and all their tokens go there and back
SHARED = ("usp", "ulysses", "loongtrain", "hybrid")  # queries stay with u consecutive ranks


def least_seconds(
    candidate: Candidate, problem: Problem | UserError, cluster: Cluster, kernel: str | None
) -> tuple[float, float]:
    """Seconds that forward and backward take at least: exact FLOPs of the busiest head group.

    The u ranks of a head group share the work of their tokens, and nobody else does any of it.
    Of an all-gather also its bytes from other nodes; of pooled tokens the way there and back.
    """
    if isinstance(problem, UserError) or (problem.layout.ranges["step"] > 1).any():
        return 0.0, 0.0
    ranges, world = problem.layout.ranges, problem.world
    order = np.argsort(ranges["start"])
    start, stop = ranges["start"][order], ranges["stop"][order]
    area = problem.mask.row_area(start, stop) / problem.mask.layers
    rank = np.bincount(ranges["owner"][order], weights=area, minlength=world)
    curves, shapes = cluster.kernel_named(kernel), problem.shapes
    least = _least_work(candidate, rank)
    forward, backward = (
        least * shapes.q_heads * pair_flops(shapes, d) / (1e12 * curves.curve(d).tflops)
        for d in DIRECTIONS
    )
    if candidate.method == "all_gather":
        sent = [_gathered_seconds(problem, d, cluster) for d in DIRECTIONS]
        return max(forward, sent[0]), max(backward, sent[1])
    if candidate.method in _POOLING and candidate.u > 1:
        there, back, grads = _pooled_seconds(problem, candidate.u, cluster)
        return forward + there + back, backward + grads
    return forward, backward


def _least_work(candidate: Candidate, rank: np.ndarray) -> float:
    """Mask area of the busiest head group; of a rank on average, where any may compute it."""
    world = len(rank)
    if candidate.method in KEY_SIDE:
        return float(rank.max())
    if candidate.method in SHARED and candidate.u > 1 and world % candidate.u == 0:
        return float(rank.reshape(-1, candidate.u).mean(axis=1).max())
    return float(rank.mean())


def _gathered_seconds(problem: Problem, direction: Direction, cluster: Cluster) -> float:
    """Seconds in which the busiest port receives what an all-gather brings from other nodes."""
    node = np.arange(problem.world) // problem.ranks_per_node
    mine = np.bincount(node, weights=problem.layout.sizes)
    shapes = problem.shapes
    size = shapes.row_bytes(Channel.K, direction, Wire.INPUT) * shapes.kv_heads
    combined = max(cluster.nics_per_node / cluster.ranks_per_node, 1.0)
    return float(problem.mask.seq_len - mine.max()) * size / (1e9 * cluster.inter.gbs * combined)


def _pooled_seconds(problem: Problem, degree: int, cluster: Cluster) -> tuple[float, float, float]:
    """Seconds in which queries, keys and values are pooled, outputs return, and gradients return,
    in the input dtype; nothing is computed beside them."""
    shapes, rows = problem.shapes, float(problem.layout.sizes.min())
    near = min(degree, problem.ranks_per_node)
    combined = max(cluster.nics_per_node / cluster.ranks_per_node, 1.0)
    # Each rank receives its heads of its peers' rows, of near and of far ones.
    slow = max(
        (near - 1) / (degree * 1e9 * cluster.intra.gbs),
        (degree - near) / (degree * 1e9 * cluster.inter.gbs * combined),
    )

    def seconds(direction: Direction, *channels: Channel) -> float:
        sizes = [shapes.row_bytes(c, direction, Wire.INPUT) * shapes.heads(c) for c in channels]
        return rows * sum(sizes) * slow

    return (
        seconds("forward", Channel.Q, Channel.K),
        seconds("forward", Channel.O),
        seconds("backward", Channel.DQ, Channel.DKV),
    )

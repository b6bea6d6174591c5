"""Which ranks share a node."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise


def ranks_per_node(world: int) -> int:
    """Consecutive ranks of a group of `world` that share a node, by the launcher's variables.

    The largest number that divides both LOCAL_WORLD_SIZE and `world`, so that runs of so many
    ranks never reach over a node's edge where nodes are equal. Without a launcher all ranks are
    taken to share one node.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return math.gcd(int(local), world) if local.isdecimal() and int(local) > 0 else world


@dataclass(frozen=True)
class Topology:
    """The nodes of a job, whose ranks are consecutive.

    Attributes:
        nodes: ranks of each node, in the order of the ranks. They may differ.
        hosts: name of each node's host.
        domains: ranks of each run of ranks that share fast links, in order: the nodes, or the parts
            of them that NVLink joins where it joins only parts.
    """

    nodes: tuple[int, ...]
    hosts: tuple[str, ...] = ()
    domains: tuple[int, ...] = ()

    @property
    def world(self) -> int:
        """All ranks."""
        return sum(self.nodes)

    @property
    def even(self) -> bool:
        """Whether all nodes have equally many ranks."""
        return len(set(self.nodes)) == 1

    def node_of(self, rank: int) -> int:
        """Number of a rank's node."""
        return next(i for i, end in enumerate(accumulate(self.nodes)) if rank < end)

    def host_of(self, rank: int) -> str:
        """Name of a rank's host; "" where it is not known."""
        return self.hosts[self.node_of(rank)] if self.hosts else ""

    def ranks_per_node(self, size: int) -> int:
        """Consecutive ranks that share fast links in every group of `size` consecutive ranks.

        The largest number L such that each run of L ranks, counted from the start of its group,
        lies in one domain. Equal for all groups, because they plan alike.

        Args:
            size: ranks of a group, a divisor of the world size.
        """
        edges = {*accumulate(self.domains or self.nodes), *range(0, self.world + 1, size)}
        return math.gcd(size, *(b - a for a, b in pairwise(sorted(edges))))


def even_nodes(world: int, per_node: int) -> Topology:
    """`world` ranks in nodes of `per_node`; the last one may be smaller."""
    full, rest = divmod(world, per_node)
    return Topology((per_node,) * full + ((rest,) if rest else ()))


def fast_domains(nodes: Iterable[list[str]]) -> tuple[int, ...]:
    """Lengths of the runs of ranks with fast links between them.

    Args:
        nodes: of each node, per rank the name of the set of GPUs that NVLink joins to its own; ""
            where that is not known.

    A node counts as one run unless every set is a run of consecutive ranks and joins several: a
    node without NVLink is still nearer together than two nodes.
    """
    found: list[int] = []
    for names in nodes:
        starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
        whole = len(starts) != len(set(names)) or "" in names
        lengths = [b - a for a, b in pairwise([*starts, len(names)])]
        found += [len(names)] if whole or max(lengths) == 1 else lengths
    return tuple(found)

"""CPU cores of this host, their NUMA nodes, and fair shares of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_DEVICES = Path("/sys/devices/system")


@dataclass(frozen=True)
class NumaNode:
    """A NUMA node.

    Attributes:
        number: its name in Linux.
        cores: its cores, each as the set of CPUs (hardware threads) that share it.
    """

    number: int
    cores: tuple[frozenset[int], ...]

    @property
    def cpus(self) -> frozenset[int]:
        """All CPUs of the node."""
        return frozenset().union(*self.cores)


def read_numa_nodes(root: Path = _DEVICES) -> tuple[NumaNode, ...]:
    """The NUMA nodes that have CPUs, from /sys; none where that cannot be read.

    A kernel without NUMA support counts as one node.
    """
    online = parse_cpus(_text(root / "cpu" / "online"))
    folders = sorted(root.glob("node/node[0-9]*"), key=lambda path: int(path.name[4:]))
    listed = [(int(path.name[4:]), parse_cpus(_text(path / "cpulist"))) for path in folders]
    listed = listed or [(0, online)]
    nodes = [NumaNode(number, _cores(root, cpus & online)) for number, cpus in listed]
    return tuple(node for node in nodes if node.cores)


def share_of_cores(
    nodes: tuple[NumaNode, ...], place: int, sharers: int, numa: int | None = None
) -> frozenset[int]:
    """The CPUs for one of `sharers` ranks: whole cores, neighbours in one NUMA node.

    Args:
        nodes: of the host.
        place: number of the rank among them.
        sharers: ranks that share the cores.
        numa: the NUMA node of the rank's GPU, which the rank then gets as a whole.

    Returns:
        CPUs; none where binding would not help: less than two cores for each rank, whose threads
        that load data and carry messages need one, or no such node.
    """
    if numa is not None:
        return next((node.cpus for node in nodes if node.number == numa), frozenset())
    cores = [core for node in nodes for core in node.cores]
    if len(cores) < 2 * sharers:
        return frozenset()
    first, last = (len(cores) * i // sharers for i in (place, place + 1))
    return frozenset().union(*cores[first:last])


def parse_cpus(text: str) -> frozenset[int]:
    """CPUs of a list such as 0-3,8,10-11; none for an empty or unreadable one."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def format_cpus(cpus: Iterable[int]) -> str:
    """The list that `parse_cpus` reads, such as 0-3,8."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _cores(root: Path, cpus: frozenset[int]) -> tuple[frozenset[int], ...]:
    """CPUs grouped by the core that they are threads of."""
    left, cores = sorted(cpus), []
    while left:
        siblings = _text(root / "cpu" / f"cpu{left[0]}" / "topology" / "thread_siblings_list")
        core = (parse_cpus(siblings) | {left[0]}) & frozenset(left)
        cores.append(core)
        left = [cpu for cpu in left if cpu not in core]
    return tuple(cores)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""

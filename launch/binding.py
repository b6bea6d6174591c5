"""Ties a rank to its part of the host: CPU cores, and the network interface it talks over."""

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from ringattn.errors import UserError
from ringattn.launch.places import Place
from ringattn.launch.ranks import Ranks
from ringattn.parallel.cores import NumaNode, share_of_cores
from ringattn.parallel.network import (
    Interface,
    interface_towards,
    is_loopback,
    network_interfaces,
    source_address,
)


@contextmanager
def on_cores(cpus: frozenset[int]) -> Iterator[None]:
    """Runs this thread, and those that it starts, on these CPUs while inside; none: on any.

    Where the system refuses, ranks stay unbound: where a thread runs changes speed, not results.
    """
    if not cpus or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def choose_cores(
    place: Place, nodes: tuple[NumaNode, ...], usable: frozenset[int], gpu_numa: int | None
) -> frozenset[int]:
    """The CPUs that a rank is tied to; none where it is left alone.

    A rank that may not use every CPU of the host was bound by its launcher or is confined by its
    container: either knows better.

    Args:
        place: of the rank.
        nodes: NUMA nodes of the host.
        usable: CPUs that the rank may use.
        gpu_numa: NUMA node of its GPU; None for ranks without.
    """
    everything = frozenset().union(*(node.cpus for node in nodes))
    if usable != everything:
        return frozenset()
    if place.core_sharers == 1 and (gpu_numa is None or len(nodes) == 1):
        return frozenset()
    if len(nodes) == 1:
        gpu_numa = None  # all GPUs hang on the one node, which ranks share
    return share_of_cores(nodes, place.core_place, place.core_sharers, gpu_numa)


def choose_interface(
    wanted: str | None, ranks: Ranks, master: str, interfaces: tuple[Interface, ...]
) -> str | None:
    """Name of the interface that this rank talks over; None leaves it to the back ends.

    Args:
        wanted: ``run.interface``.
        ranks: of the job.
        master: MASTER_ADDR.
        interfaces: of this host.

    Raises:
        UserError: an interface that is not there, is down or has no address.
    """
    if ranks.world == 1 or not interfaces:
        return None
    if wanted is not None:
        _check_interface(wanted, interfaces)
        return wanted
    if ranks.local_world == ranks.world or is_loopback(master):
        return None
    found = interface_towards(master, interfaces)
    if found is None or found.loopback:
        # On rank 0's own host its name may lead to loopback; others come in from far away.
        address = source_address()
        found = next((one for one in interfaces if address in one.addresses), None)
    if found is None or found.loopback:
        # Without a route to far away, there may still be only one way out.
        out = [one for one in interfaces if one.up and one.addresses and not one.loopback]
        found = out[0] if len(out) == 1 else None
    return found.name if found is not None else None


def _check_interface(wanted: str, interfaces: tuple[Interface, ...]) -> None:
    there = ", ".join(one.name for one in interfaces if one.up and one.addresses) or "none"
    found = next((one for one in interfaces if one.name == wanted), None)
    if found is None:
        rule = "is no network interface of this host"
    elif not found.up:
        rule = "is down"
    elif not found.addresses:
        rule = "has no address"
    else:
        return
    raise UserError(
        f"run.interface={wanted}", f"{rule}, whose interfaces that are up are {there}",
        "name one of them, or set run.interface=null",
    )  # fmt: skip


def use_interface(
    environ: MutableMapping[str, str], wanted: str | None, ranks: Ranks
) -> str | None:
    """Tells gloo, NCCL and TensorPipe which interface to use, before any group is opened.

    What the environment says already is kept, unless ``run.interface`` names one.

    Args:
        environ: variables of this process.
        wanted: ``run.interface``.
        ranks: of the job.

    Returns:
        The interface; None where the back ends choose.

    Raises:
        UserError: as `choose_interface`.
    """
    master = environ.get("MASTER_ADDR", "localhost")
    name = choose_interface(wanted, ranks, master, network_interfaces())
    if name is None:
        return None
    # NCCL takes a name for a prefix of several unless it is marked as exact.
    values = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}",
              "TP_SOCKET_IFNAME": name}  # fmt: skip
    for key, value in values.items():
        environ[key] = value if wanted is not None else environ.get(key, value)
    return name

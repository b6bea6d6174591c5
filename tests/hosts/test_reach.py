"""Hosts that cannot reach each other are named, and those that can go on."""

import json
import subprocess
import sys

import pytest

from tests.hosts.namespaces import ip
from tests.hosts.network import Network, open_network
from tests.launch.training import REPOSITORY

pytestmark = pytest.mark.full

# One rank. Arguments: rank, world, local rank, local world. Prints what it is told.
_RANK = """
import os, sys
from datetime import timedelta
import torch.distributed as dist
from ringattn.errors import UserError
from ringattn.launch.ranks import Ranks
from ringattn.launch.reach import check_reach
rank, world, local_rank, local_world = map(int, sys.argv[1:])
store = dist.TCPStore("10.77.0.1", 29400, None, rank == 0, timedelta(seconds=60), False)
ranks = Ranks(rank=rank, world=world, local_rank=local_rank, local_world=local_world)
try:
    check_reach(ranks, store, os.environ, 3.0)
    told = "reached"
except UserError as error:
    told = str(error)
print(told)
store.set(f"done {rank}", "")
if rank == 0:
    store.wait([f"done {other}" for other in range(world)])
"""


def check(
    network: Network, per_host: int, env: dict[str, str], local_world: int | None = None
) -> str:
    """What all ranks are told, which must be the same."""
    local_world = local_world or per_host
    count = len(network.hosts)
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **env}
    processes: list[subprocess.Popen[str]] = []
    for rank in range(count * per_host):
        host = network.hosts[rank // per_host]
        place = (rank, count * per_host, rank % local_world, local_world)
        argv = [sys.executable, "-c", _RANK, *(str(number) for number in place)]
        processes.append(host.popen(argv, environment))
    outputs = [process.communicate() for process in processes]
    told = {out.strip() for out, _ in outputs}
    assert len(told) == 1, json.dumps(outputs, indent=1)
    return told.pop()


def test_hosts_that_reach_each_other() -> None:
    with open_network(3) as network:
        assert check(network, 2, {}) == "reached"
        assert check(network, 1, {"GLOO_SOCKET_IFNAME": "eth0"}) == "reached"


def test_hosts_that_do_not_are_named() -> None:
    with open_network(2) as network:
        for host in network.hosts:
            host.add_dead_end()
        assert check(network, 1, {"GLOO_SOCKET_IFNAME": "eth0"}) == "reached"
        line = check(network, 1, {"GLOO_SOCKET_IFNAME": "dead0"})
        assert "(host0, dead0, 10.78.0.1)" in line
        assert "(host1, dead0, 10.78.0.2)" in line
        assert "no answer within 3 s" in line


def _add_ipv6(network: Network, *, joined: bool) -> None:
    """Gives every host an interface six0 with an IPv6 address alone, on the switch or on none."""
    for host in network.hosts:
        port = f"six{host.index}"
        peer = ("peer", "name", "six0", "netns", host.namespace)
        ip("-n", host.switch, "link", "add", port, "type", "veth", *peer)
        ip("-n", host.switch, "link", "set", port, *(["master", "bridge"] if joined else []), "up")
        ip("-n", host.namespace, "link", "set", "six0", "up")
        address = f"fd77::{host.index + 1}/64"
        ip("-n", host.namespace, "address", "add", address, "dev", "six0", "nodad")


@pytest.mark.parametrize("joined", [True, False])
def test_hosts_with_ipv6_alone(joined: bool) -> None:
    with open_network(2) as network:
        _add_ipv6(network, joined=joined)
        told = check(network, 1, {"GLOO_SOCKET_IFNAME": "six0"})
    if joined:
        assert told == "reached"
    else:
        assert "(host0, six0, fd77::1)" in told
        assert "(host1, six0, fd77::2)" in told


def test_two_launchers_on_one_host_need_no_network() -> None:
    with open_network(1, loopback_names=True) as network:
        assert check(network, 2, {}, local_world=1) == "reached"


def test_missing_interfaces_and_loopback_names() -> None:
    with open_network(2) as network:
        assert "nosuch0: gives rank" in check(network, 1, {"GLOO_SOCKET_IFNAME": "nosuch0"})
    with open_network(2, loopback_names=True) as network:
        assert "loopback address" in check(network, 1, {})
        assert check(network, 1, {"GLOO_SOCKET_IFNAME": "eth0"}) == "reached"

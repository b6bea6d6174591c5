"""The hosts themselves: they see each other, and every fault does what it says."""

import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.hosts import namespaces
from tests.hosts.network import Host, Network, open_network
from tests.hosts.relay import Lane

# Sends back what it receives, to one client after the other.
_ECHO = """
import socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
while True:
    client, _ = server.accept()
    with client:
        while got := client.recv(65536):
            client.sendall(got)
"""

# Sends so many bytes to host0 and prints how many came back, and the seconds of five exchanges.
_CALL = """
import socket, sys, threading, time
with socket.create_connection(("host0", 5000), timeout=100) as server:
    began = time.monotonic()
    for _ in range(5):
        server.sendall(b"x")
        server.recv(1)
    exchanges = time.monotonic() - began
    data = bytes(int(sys.argv[1]))
    thread = threading.Thread(target=lambda: (server.sendall(data), server.shutdown(1)))
    thread.start()
    count = 0
    while got := server.recv(65536):
        count += len(got)
    print(count, exchanges, time.monotonic() - began)
"""

# One exchange; prints what became of it.
_TRY = """
import socket
try:
    with socket.create_connection(("10.77.0.1", 5000), timeout=1) as server:
        server.sendall(b"x")
        print("answered" if server.recv(1) else "closed")
except OSError as error:
    print(error)
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with open_network(2) as network:
        yield network


def serve(host: Host) -> subprocess.Popen[str]:
    process = host.popen([sys.executable, "-c", _ECHO])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def call(host: Host, size: int = 100_000) -> tuple[float, float]:
    """Seconds of five exchanges, and of all; nothing may be lost or torn on the way."""
    count, exchanges, whole = host.run(sys.executable, "-c", _CALL, str(size)).split()
    assert int(count) == size
    return float(exchanges), float(whole)


def test_hosts_have_names_and_addresses_of_their_own(network: Network) -> None:
    for host in network.hosts:
        assert host.run("hostname").strip() == host.name
        assert host.address in host.run("ip", "-4", "address", "show", host.interface)
        for other in network.hosts:
            resolved = host.run("getent", "ahostsv4", other.name)
            assert resolved.split()[0] == other.address
    assert subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip() not in {
        host.name for host in network.hosts
    }


def test_two_networks_do_not_meet(network: Network) -> None:
    with open_network(2) as other:
        serve(other.hosts[0])
        with pytest.raises(RuntimeError, match="refused"):
            call(network.hosts[1])
        call(other.hosts[1])


def test_cut_and_mend(network: Network) -> None:
    server, client = network.hosts
    serve(server)
    call(client)
    client.cut()
    assert client.run(sys.executable, "-c", _TRY) != "answered\n"
    client.mend()
    call(client)


def test_a_killed_host_is_silent_and_the_others_go_on(network: Network) -> None:
    server, client = network.hosts
    process = serve(server)
    other = serve(client)
    server.kill()
    assert process.wait(10.0) != 0
    assert server.pids() == []
    assert other.poll() is None
    assert client.run(sys.executable, "-c", _TRY) != "answered\n"


def test_an_interface_that_leads_nowhere(network: Network) -> None:
    server, client = network.hosts
    serve(server)
    address = server.add_dead_end()
    client.add_dead_end()
    assert "timed out" in client.run(sys.executable, "-c", _TRY.replace("10.77.0.1", address))


@pytest.mark.parametrize("relay", [False, True])
def test_a_slow_link(network: Network, relay: bool) -> None:
    """Lower bounds alone: they hold on a machine of any load."""
    server, client = network.hosts
    serve(server)
    by = client.shape(rate=10e6, relay=relay)
    assert by in (("relay",) if relay else ("tbf", "relay"))
    assert call(client, 500_000)[1] >= 0.9 * 500_000 * 8 / 10e6


@pytest.mark.parametrize("relay", [False, True])
def test_a_link_with_delay_and_loss(network: Network, seed: int, relay: bool) -> None:
    """By ``netem`` where the kernel has it, else by the relay: what is asked for comes about."""
    server, client = network.hosts
    serve(server)
    by = client.shape(delay=0.01, loss=0.02, seed=seed, relay=relay)
    assert by in (("relay",) if relay else ("netem", "relay"))
    assert call(client, 300_000)[0] >= 5 * 0.02


def test_a_lane_delays_limits_and_loses(seed: int) -> None:
    lane = Lane(rate=8000.0, delay=0.5, loss=0.0, random=random.Random(seed))
    for frame in (b"a" * 1000, b"b" * 500):  # 1 s and 0.5 s at 1000 bytes per second
        lane.push(10.0, frame)
    assert lane.next_at() == 11.5
    assert lane.pop(11.49) is None
    assert lane.pop(11.5) == b"a" * 1000
    assert lane.pop(11.99) is None
    assert lane.pop(12.0) == b"b" * 500
    assert lane.next_at() is None

    lossy = Lane(rate=0.0, delay=0.0, loss=0.1, random=random.Random(seed))
    frames = [number.to_bytes(2, "big") for number in range(1000)]
    for frame in frames:
        lossy.push(0.0, frame)
    kept = list(iter(lambda: lossy.pop(0.0), None))
    assert kept == sorted(kept)
    assert len(kept) == 1000 - lossy.lost
    assert 50 <= lossy.lost <= 150


def test_a_lane_drops_what_does_not_fit_its_queue(seed: int) -> None:
    lane = Lane(rate=8.0, delay=0.0, loss=0.0, random=random.Random(seed))
    for _ in range(1000):
        lane.push(0.0, bytes(1500))
    assert lane.lost > 0
    assert 0 < sum(1 for _ in iter(lambda: lane.pop(1e9), None)) == 1000 - lane.lost


def test_leftovers_of_a_killed_run_are_removed(network: Network) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    name = f"ringattn-{ended.pid}-1-abcdef-host0"
    namespaces.make(name, "127.0.0.1 localhost\n")
    left = subprocess.Popen([*namespaces.entering(name, "host0"), "sleep", "1000"])
    assert name in namespaces.remove_leftovers()
    assert left.wait(10.0) != 0
    names = namespaces.ip("netns", "list")
    assert name not in names
    assert network.hosts[0].namespace in names


def test_a_refusal_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    assert namespaces.refusal() == "network namespaces need root"
    monkeypatch.undo()

    def forbidden(*_: str) -> str:
        raise RuntimeError("ip netns add: Operation not permitted")

    monkeypatch.setattr(namespaces, "make", forbidden)
    assert "Operation not permitted" in (namespaces.refusal() or "")

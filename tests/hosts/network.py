"""Several hosts on one machine: network namespaces joined by a switch.

    with open_network(2) as network:
        process = network.hosts[0].popen(["hostname"])

Each host has its own address, host name and ``/etc/hosts``; the switch is a bridge in a namespace
of its own. Nothing of this is visible to the machine's own network, so networks of several runs
have the same addresses and do not meet. Hosts share processes, files and clocks with the machine.

    host namespace                switch namespace
    eth0 10.77.0.1  ── veth ──  port0 ─┐
                                       ├─ bridge
    eth0 10.77.0.2  ── veth ──  near ─ relay ─ far ─┘      with `Host.shape` by the relay
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.hosts import namespaces
from tests.hosts.namespaces import ip

_SUBNET, _DEAD_END = "10.77.0", "10.78.0"
_BRIDGE = "bridge"
_LOCALHOST = "127.0.0.1 localhost\n::1 localhost\n"
_RELAY = Path(__file__).with_name("relay.py")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host of a network.

    Attributes:
        index: 0 … N−1. name: its host name, which every host resolves to `address`.
        address: of its interface `interface`.
        namespace: its network namespace. switch: that of the network.
    """

    index: int
    name: str
    address: str
    namespace: str
    switch: str
    interface: str = "eth0"
    _relays: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    @property
    def _port(self) -> str:
        return f"port{self.index}"

    def popen(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdin: IO[str] | int | None = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:
        """Starts a command on this host, in a session of its own; its outputs are pipes."""
        return subprocess.Popen(
            [*namespaces.entering(self.namespace, self.name), *argv],
            env=env,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *argv: str) -> str:
        """Runs a short command on this host; returns its standard output.

        Raises:
            RuntimeError: it failed.
        """
        return namespaces.run([*namespaces.entering(self.namespace, self.name), *argv])

    def pids(self) -> list[int]:
        """The processes that run on this host."""
        return namespaces.pids(self.namespace)

    def cut(self) -> None:
        """Pulls the cable: nothing is delivered any more, and nobody is told."""
        ip("-n", self.switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        ip("-n", self.switch, "link", "set", self._port, "up")

    def kill(self) -> None:
        """The host loses power: its link goes first, so that its dying processes tell nobody."""
        self.cut()
        namespaces.kill_all(self.namespace)

    def add_dead_end(self, name: str = "dead0") -> str:
        """Adds an interface that leads nowhere; returns its address.

        Other hosts with such an interface seem to be in its subnet: what is sent there vanishes.
        """
        address, nowhere = f"{_DEAD_END}.{self.index + 1}", f"{name}-{self.index}"
        peer = ("peer", "name", nowhere, "netns", self.switch)
        ip("-n", self.namespace, "link", "add", name, "type", "veth", *peer)
        ip("-n", self.switch, "link", "set", nowhere, "up")
        ip("-n", self.namespace, "address", "add", f"{address}/24", "dev", name)
        # Without ARP nobody finds out that there is nobody, as behind a firewall that drops.
        ip("-n", self.namespace, "link", "set", name, "up", "arp", "off")
        return address

    def shape(
        self,
        *,
        rate: float | None = None,
        delay: float = 0.0,
        loss: float = 0.0,
        seed: int = 0,
        relay: bool = False,
    ) -> str:
        """Makes this host's link slow or lossy, in both directions. Once per host.

        Args:
            rate: bits per second; None for no limit.
            delay: seconds, each way. loss: part of the frames that vanish.
            seed: of the losses, where the relay makes them.
            relay: not by the kernel even if it can.

        Returns:
            What does it: "netem" or "tbf" of the kernel, or "relay", a process.
        """
        shaped = [] if relay else _queues(rate, delay, loss)
        ends = (self.namespace, self.interface), (self.switch, self._port)
        for name, queue in shaped:
            try:
                for namespace, device in ends:
                    arguments = ["qdisc", "replace", "dev", device, "root", name, *queue]
                    namespaces.run(["tc", "-n", namespace, *arguments])
            except (RuntimeError, FileNotFoundError):  # no such queue in this kernel, or no `tc`
                continue
            return name
        self._start_relay([str(rate or 0), str(delay), str(loss), str(seed)])
        return "relay"

    def _start_relay(self, arguments: list[str]) -> None:
        """Moves this host's port from the bridge to one that only the relay joins with it."""
        near, far, side = (f"{what}{self.index}" for what in ("near", "far", "side"))
        process = subprocess.Popen(
            [*namespaces.entering(self.switch, "switch"), sys.executable, str(_RELAY)]
            + [near, far, *arguments],
            stdin=subprocess.PIPE,  # it ends when this closes: also when this process is killed
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._relays.append(process)
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the relay did not start")
        switch = ("-n", self.switch, "link")
        ip(*switch, "add", side, "type", "bridge")
        for device, bridge in ((near, side), (far, _BRIDGE), (self._port, side)):
            ip(*switch, "set", device, "master", bridge)
        for device in (side, near, far):
            ip(*switch, "set", device, "up")

    def _close(self) -> None:
        namespaces.remove(self.namespace)
        for process in self._relays:
            process.kill()
            process.communicate()


@dataclass(frozen=True, kw_only=True)
class Network:
    """Hosts on one switch; see `open_network`."""

    hosts: tuple[Host, ...]


@contextmanager
def open_network(count: int, *, loopback_names: bool = False) -> Iterator[Network]:
    """`count` hosts joined by a switch; at the end all that runs on them is killed.

    Args:
        count: number of hosts.
        loopback_names: every host resolves its own name to 127.0.1.1, as Debian sets hosts up.

    Raises:
        RuntimeError: the kernel refuses; `namespaces.refusal` says so beforehand.
    """
    name = namespaces.new_network()
    switch = f"{name}-switch"
    hosts = tuple(
        Host(
            index=index,
            name=f"host{index}",
            address=f"{_SUBNET}.{index + 1}",
            namespace=f"{name}-host{index}",
            switch=switch,
        )
        for index in range(count)
    )
    with ExitStack() as stack:
        stack.callback(namespaces.remove, switch)
        namespaces.make(switch, "127.0.0.1 localhost switch\n")
        ip("-n", switch, "link", "add", _BRIDGE, "type", "bridge")
        ip("-n", switch, "link", "set", _BRIDGE, "up")
        for host in hosts:
            stack.callback(host._close)
            namespaces.make(host.namespace, _names(hosts, host if loopback_names else None))
            _plug_in(host)
        yield Network(hosts=hosts)


def _names(hosts: Sequence[Host], hidden: Host | None) -> str:
    """``/etc/hosts``; the name of `hidden` leads to the loopback."""
    known = [(host.address if host is not hidden else "127.0.1.1", host.name) for host in hosts]
    return _LOCALHOST + "".join(f"{address} {name}\n" for address, name in known)


def _plug_in(host: Host) -> None:
    """Joins a host to its switch."""
    port, inside = host._port, ("-n", host.namespace)
    peer = ("peer", "name", host.interface, "netns", host.namespace)
    ip("-n", host.switch, "link", "add", port, "type", "veth", *peer)
    ip("-n", host.switch, "link", "set", port, "master", _BRIDGE, "up")
    ip(*inside, "address", "add", f"{host.address}/24", "dev", host.interface)
    ip(*inside, "link", "set", host.interface, "up")


def _queues(rate: float | None, delay: float, loss: float) -> list[tuple[str, list[str]]]:
    """Queues of the kernel that give such a link, with their arguments, the best one first."""
    limit = [] if rate is None else ["rate", f"{rate:.0f}bit"]
    netem = [*limit, "delay", f"{delay * 1e6:.0f}us", "loss", f"{loss * 100:.4f}%"]
    if delay or loss:
        return [("netem", netem)]
    return [("tbf", [*limit, "burst", "16kb", "latency", "100ms"])] if limit else []

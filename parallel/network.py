"""The network interfaces and InfiniBand devices of this host, from the Linux kernel."""

import socket
import struct
import sys
from array import array
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

_SIOCGIFCONF, _SIOCGIFFLAGS = 0x8912, 0x8913
_IFF_UP, _IFF_LOOPBACK, _IFF_RUNNING = 0x1, 0x8, 0x40
_IFREQ = 40  # bytes of struct ifreq where pointers have 8
_ANYWHERE = "198.51.100.1"  # an address for documentation: it is routed like any far one


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface.

    Attributes:
        name: such as eth0. up: switched on, with a carrier. loopback: it leads nowhere else.
        addresses: IPv4 and IPv6.
        speed_mbits: of the link; None where the driver does not say. numa: node it hangs on, or
            None.
    """

    name: str
    up: bool
    loopback: bool = False
    addresses: tuple[str, ...] = ()
    speed_mbits: int | None = None
    numa: int | None = None


@dataclass(frozen=True, kw_only=True)
class FabricPort:
    """A port of an InfiniBand or RoCE device.

    Attributes:
        device: such as mlx5_0. port: number. active: its link is up.
        rate_gbits: of the link. numa: node the device hangs on; None where unknown.
    """

    device: str
    port: int
    active: bool
    rate_gbits: float | None = None
    numa: int | None = None


def network_interfaces() -> tuple[Interface, ...]:
    """The interfaces of this process's network namespace; none where the system is not Linux."""
    if sys.platform != "linux":
        return ()
    addresses = [*_ipv4_addresses(), *_ipv6_addresses()]
    return tuple(
        _interface(name, tuple(address for owner, address in addresses if owner == name))
        for _, name in socket.if_nameindex()
    )


def fabric_ports(root: Path = Path("/sys/class/infiniband")) -> tuple[FabricPort, ...]:
    """The ports of the InfiniBand and RoCE devices of this host."""
    return tuple(
        FabricPort(
            device=port.parent.parent.name,
            port=int(port.name),
            active="ACTIVE" in _text(port / "state"),
            rate_gbits=_leading_number(_text(port / "rate")),
            numa=_numa(port.parent.parent / "device"),
        )
        for port in sorted(root.glob("*/ports/*"))
        if port.name.isdecimal()
    )


def source_address(target: str = _ANYWHERE) -> str | None:
    """This host's address on the route to `target`; None without a route. Nothing is sent.

    Args:
        target: name or address of a host; by default one far away.
    """
    try:
        found = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(where)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None


def interface_towards(target: str, interfaces: tuple[Interface, ...]) -> Interface | None:
    """The interface of the route to `target`; None where none is known."""
    address = source_address(target)
    return next((one for one in interfaces if address in one.addresses), None)


def is_loopback(address: str) -> bool:
    """Whether an address or name, such as localhost, can mean this host alone."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _interface(name: str, addresses: tuple[str, ...]) -> Interface:
    import fcntl  # absent on Windows

    # Asked of the kernel rather than of /sys, which may show another network namespace.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack(f"{_IFREQ}s", name.encode())
        try:
            (flags,) = struct.unpack_from("H", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)
        except OSError:  # it is gone meanwhile
            flags = 0
    folder = Path("/sys/class/net") / name
    speed = _leading_number(_text(folder / "speed"))
    return Interface(
        name=name,
        up=flags & _IFF_UP > 0 and flags & _IFF_RUNNING > 0,
        loopback=flags & _IFF_LOOPBACK > 0,
        addresses=addresses,
        speed_mbits=int(speed) if speed is not None and speed > 0 else None,
        numa=_numa(folder / "device"),
    )


def _ipv4_addresses() -> list[tuple[str, str]]:
    """(interface, address) pairs, further addresses of an interface included."""
    import fcntl  # absent on Windows

    room = 64 * _IFREQ
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        while True:
            buffer = array("B", bytes(room))
            request = struct.pack("iP", room, buffer.buffer_info()[0])
            (used,) = struct.unpack_from("i", fcntl.ioctl(probe, _SIOCGIFCONF, request))
            if used < room:
                break
            room *= 2  # a full answer may have left some out
    entries = [buffer[at : at + _IFREQ].tobytes() for at in range(0, used, _IFREQ)]
    # An alias such as eth0:1 is an address of eth0.
    return [
        (entry[:16].split(b"\0")[0].decode().split(":")[0], socket.inet_ntoa(entry[20:24]))
        for entry in entries
    ]


def _ipv6_addresses() -> list[tuple[str, str]]:
    lines = [line.split() for line in _text(Path("/proc/net/if_inet6")).splitlines()]
    return [
        (name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
        for digits, _, _, _, _, name in lines
    ]


def _numa(device: Path) -> int | None:
    """NUMA node of a device's folder in /sys; None where it hangs on none in particular."""
    number = _leading_number(_text(device / "numa_node"))
    return int(number) if number is not None and number >= 0 else None


def _leading_number(text: str) -> float | None:
    """The number that a text such as "400 Gb/sec (4X NDR)" begins with."""
    try:
        return float(text.split()[0])
    except (IndexError, ValueError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""

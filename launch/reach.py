"""Whether the hosts of a job can reach each other, before anything waits for it.

An interface that leads nowhere is the commonest mistake on several hosts, and gloo tries five times
``run.timeout_s`` before it gives up without saying who could not reach whom.
"""

import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address

import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.ranks import Ranks
from ringattn.parallel.host import host_key
from ringattn.parallel.network import is_loopback, network_interfaces

_STANDS, _FOUND, _VERDICT = "ringattn/reach/at/", "ringattn/reach/found/", "ringattn/reach/verdict"
_CONNECT_S = 20.0  # a lost first packet is sent again after 1, 3, 7 and 15 s


@dataclass(frozen=True, kw_only=True)
class _Stand:
    """Where the first rank of a host listens.

    Attributes:
        rank, host: who. key: equal for launchers on one host, which reach each other anyhow.
        interface: its name; "" where the host's own name was looked up.
        address, port: of the listener; "" where it has no address to listen on.
    """

    rank: int
    host: str
    key: str
    interface: str
    address: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} ({self._where()})"

    def _where(self) -> str:
        return ", ".join(part for part in (self.host, self.interface, self.address) if part)


def check_reach(
    ranks: Ranks, store: dist.Store, environ: Mapping[str, str], timeout_s: float
) -> None:
    """Lets the first rank of every host connect to those of the others. Every rank calls it.

    The addresses are those that gloo will take: of the interface in GLOO_SOCKET_IFNAME, else of
    the host's own name. Communicates through `store`.

    Args:
        ranks: of the job. store: shared by them.
        environ: variables of this process.
        timeout_s: a connection that takes longer fails, at the latest after 20 s.

    Raises:
        UserError: on every rank alike, naming two ranks that cannot reach each other.
    """
    if ranks.local_world == ranks.world or not network_interfaces():
        return
    if ranks.local_rank:
        store.set(f"{_STANDS}{ranks.rank}", "")
        _agree(store)
        return
    with ExitStack() as listening:
        stand, mistake = _stand(ranks.rank, listening, environ)
        store.set(f"{_STANDS}{ranks.rank}", json.dumps(asdict(stand)))
        stands = [
            _Stand(**json.loads(text))
            for text in store.multi_get([f"{_STANDS}{rank}" for rank in range(ranks.world)])
            if text
        ]
        if not mistake and stand.address:
            mistake = _connect(stand, stands, min(timeout_s, _CONNECT_S))
        store.set(f"{_FOUND}{ranks.rank}", json.dumps(mistake))
        if ranks.rank == 0:
            found = store.multi_get([f"{_FOUND}{one.rank}" for one in stands])
            mistakes = [heard for text in found if (heard := json.loads(text))]
            store.set(_VERDICT, json.dumps(mistakes[0] if mistakes else []))
        _agree(store)  # until everybody has connected, the listener stays


def _agree(store: dist.Store) -> None:
    if mistake := json.loads(store.get(_VERDICT)):
        raise UserError(*mistake)


def _stand(rank: int, listening: ExitStack, environ: Mapping[str, str]) -> tuple[_Stand, list[str]]:
    """Starts to listen; returns where, and the mistake that keeps it from doing so or nothing.

    `listening` ends it.
    """
    host, name = socket.gethostname(), environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    nowhere = _Stand(rank=rank, host=host, key=host_key(), interface=name)
    try:
        addresses = _addresses_of(name) if name else _addresses_of_host(host)
        addresses = [one for one in addresses if not _link_local(one)]
        if not addresses:
            return nowhere, []  # an address that means something on its own link alone
        # Of both kinds, the kernel tells the older one first, and gloo takes the first.
        address = min(addresses, key=lambda one: ":" in one)
        listener = listening.enter_context(socket.socket(_family(address), socket.SOCK_STREAM))
        listener.bind((address, 0))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        what = f"GLOO_SOCKET_IFNAME={name}" if name else f"host name {host}"
        there = ", ".join(one.name for one in network_interfaces() if one.up and one.addresses)
        rule = f"gives {nowhere} no address ({error.strerror or error})"
        return nowhere, [what, rule, f"set run.interface to one of its interfaces: {there}"]
    port = int(listener.getsockname()[1])
    return replace(nowhere, address=address, port=port), []


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _link_local(address: str) -> bool:
    """Whether an IPv6 address names a host of its own link only, as every interface has one."""
    return ":" in address and ip_address(address.partition("%")[0]).is_link_local


def _addresses_of(interface: str) -> tuple[str, ...]:
    """Addresses of an interface of this host. Raises OSError."""
    for one in network_interfaces():
        if one.name == interface:
            if one.addresses:
                return one.addresses
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


def _addresses_of_host(name: str) -> tuple[str, ...]:
    """Addresses that a host name leads to. Raises OSError."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return tuple(str(where[0]) for *_, where in found)


def _connect(mine: _Stand, stands: list[_Stand], timeout_s: float) -> list[str]:
    """Connects to all others at once; returns the mistake that one of them shows, or nothing.

    Connections need not be accepted: the other host's kernel completes them.
    """
    end = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as waiting:
        try:
            for other in stands:
                if other.key == mine.key or not other.address:
                    continue
                if is_loopback(other.address):
                    rule = "takes a loopback address, which no other host can reach"
                    return [str(other), rule, _fix(other)]
                link = socket.socket(_family(other.address), socket.SOCK_STREAM)
                waiting.register(link, selectors.EVENT_WRITE, other)
                link.setblocking(False)
                error = link.connect_ex((other.address, other.port))
                if error not in (0, errno.EINPROGRESS):
                    return _mistake(mine, other, os.strerror(error))
            while waiting.get_map():
                ready = waiting.select(max(0.0, end - time.monotonic()))
                for key, _ in ready:
                    if error := _finish(waiting, key):
                        return _mistake(mine, key.data, error)
                if not ready and time.monotonic() >= end:
                    late = next(iter(waiting.get_map().values())).data
                    return _mistake(mine, late, f"no answer within {timeout_s:g} s")
        finally:
            for key in list(waiting.get_map().values()):
                waiting.unregister(key.fileobj)
                _socket(key).close()
    return []


def _finish(waiting: selectors.BaseSelector, key: selectors.SelectorKey) -> str:
    """Closes a connection that has come about or failed; returns why it failed, or ""."""
    link = _socket(key)
    error = link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    waiting.unregister(link)
    link.close()
    return os.strerror(error) if error else ""


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def _mistake(mine: _Stand, other: _Stand, error: str) -> list[str]:
    return [str(mine), f"cannot reach {other}: {error}", _fix(mine)]


def _fix(mine: _Stand) -> str:
    now = f"{mine.interface} is used now" if mine.interface else "null takes the host name's"
    return f"set run.interface to the interface that joins the hosts ({now})"

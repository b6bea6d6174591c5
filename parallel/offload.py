"""Tensors that wait in host memory between forward and backward.

Copies run beside the computation: on CUDA on a stream of their own in each direction, to and from
pinned memory. A *bundle* holds what belongs together, such as the tensors of a layer. Bundles leave
in the order of the forward and return in the opposite one: asking for one bundle's tensor starts
the copies of the bundle before it. At most two bundles are on the device in either direction, since
a stream that computes waits for a copy before its memory is given up. Nothing waits on the host.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ringattn.parallel.host_memory import Copies, HostBuffer, HostBuffers, copies_for

MOVED = 1 << 10  # bytes; smaller tensors stay where they are


class HostStore:
    """Host memory for the tensors of one process; makes bundles.

    Args:
        copies: how copies are made, by default by the device of each tensor.

    Attributes:
        device_bytes: of tensors that are on the device now because of the store.
    """

    def __init__(self, copies: Copies | None = None) -> None:
        self._copies: dict[str, Copies] = {}
        self._given = copies
        self._buffers: dict[str, HostBuffers] = {}
        self._bundles: list[weakref.ref[Bundle]] = []
        self.device_bytes = 0

    def bundle(self) -> "Bundle":
        """A new bundle, later than all others; the last but one gives up its device memory."""
        self._bundles = [ref for ref in self._bundles if ref() is not None]
        for ref in self._bundles[:-1]:
            if (older := ref()) is not None:
                older.leave()
        made = Bundle(self)
        self._bundles.append(weakref.ref(made))
        return made

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held, free buffers included."""
        return sum(buffers.nbytes for buffers in self._buffers.values())

    def copies(self, device: torch.device) -> Copies:
        """How tensors of a device are copied."""
        key = str(device)
        if key not in self._copies:
            self._copies[key] = self._given or copies_for(device)
        return self._copies[key]

    def buffers(self, device: torch.device) -> HostBuffers:
        """Host memory that a device copies to."""
        key = str(device)
        if key not in self._buffers:
            self._buffers[key] = HostBuffers(self.copies(device))
        return self._buffers[key]

    def before(self, bundle: "Bundle") -> "Bundle | None":
        """The last living bundle that is older than `bundle`."""
        found = None
        for ref in self._bundles:
            if (other := ref()) is bundle:
                return found
            found = other if other is not None else found
        return None


class Bundle:
    """Tensors that leave and return together. It lives as long as one of its tickets."""

    def __init__(self, store: HostStore) -> None:
        self.store = store
        self._entries: list[weakref.ref[_Entry]] = []

    def put(self, tensor: torch.Tensor) -> "Ticket":
        """Starts the copy of a tensor to host memory; the caller may let go of it at once.

        Nobody may write to the tensor any more. Small tensors are kept as they are.
        """
        if tensor.numel() * tensor.element_size() < MOVED:
            return Ticket(None, tensor.detach())
        entry = _Entry(self, tensor.detach().contiguous())
        self._entries.append(weakref.ref(entry))
        return Ticket(entry, None)

    def leave(self) -> None:
        """Gives up device memory, once what has been queued there so far has been copied."""
        for entry in self._alive():
            entry.leave()

    def fetch(self) -> None:
        """Starts the copies back to the device."""
        for entry in self._alive():
            entry.fetch()

    def fetch_before(self) -> None:
        """Starts the copies of the bundle that is needed after this one."""
        if (older := self.store.before(self)) is not None:
            older.fetch()

    def _alive(self) -> list["_Entry"]:
        return [entry for ref in self._entries if (entry := ref()) is not None]


@dataclass(frozen=True, eq=False)
class Ticket:
    """What `Bundle.put` gives for a tensor. Letting go of it frees the host memory."""

    entry: "_Entry | None"
    here: torch.Tensor | None

    def get(self) -> torch.Tensor:
        """The tensor on its device, usable on the current stream. May be called again."""
        if self.entry is None:
            assert self.here is not None
            return self.here
        return self.entry.get()


class _Entry:
    """A tensor: on the device, in host memory, or on the way."""

    def __init__(self, bundle: Bundle, tensor: torch.Tensor) -> None:
        self.bundle, self.store = bundle, bundle.store
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.copies = self.store.copies(tensor.device)
        self.home = self.copies.here()
        self.nbytes = tensor.numel() * tensor.element_size()
        self.buffer: HostBuffer = self.store.buffers(tensor.device).take(self.nbytes)
        self.value: torch.Tensor | None = None
        self.arrival: Any = None
        self._hold(tensor)
        self.copies.copy(self._host, tensor, "out", [self.buffer.free])
        self.buffer.free = self.departure = self.copies.event("out")

    @property
    def _host(self) -> torch.Tensor:
        return self.buffer.memory[: self.nbytes].view(self.dtype).view(self.shape)

    def get(self) -> torch.Tensor:
        self.fetch()
        value, here = self.value, self.copies.here()
        assert value is not None
        self.copies.wait(self.arrival, here)
        self.leave()
        self.bundle.fetch_before()
        return value

    def fetch(self) -> None:
        if self.value is not None:
            return
        # Memory of the stream that computes: it may still be in use by what that stream has
        # queued, so the copy starts after that.
        self.home = self.copies.here()
        value = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self._hold(value)
        self.copies.copy(value, self._host, "back", [self.departure])
        self.buffer.free = self.arrival = self.copies.event("back")

    def leave(self) -> None:
        """Lets go of the device memory, after copies that read or write it."""
        if self.value is not None:
            self.copies.wait(self.departure, self.home)
            self.copies.wait(self.arrival, self.home)
            self.value = None
            self.store.device_bytes -= self.nbytes

    def _hold(self, value: torch.Tensor) -> None:
        self.value = value
        self.store.device_bytes += self.nbytes

    def __del__(self) -> None:
        if hasattr(self, "departure"):
            self.leave()
            self.store.buffers(self.device).give(self.buffer)

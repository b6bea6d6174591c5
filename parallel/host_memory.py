"""Host memory that a device copies to and from, and the copies themselves."""

import mmap
import weakref
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Lane = Literal["out", "back"]


class Copies(Protocol):
    """Copies between a device and host memory, in two lanes that each keep their order.

    Events and streams are the device's own, or None where copies are done when `copy` returns.
    """

    def here(self) -> Any:
        """The stream that computes now."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Host memory that copies may run from and to, uint8 (nbytes,)."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor, lane: Lane, after: list) -> None:
        """Starts a copy in a lane, after these events and what the current stream has queued."""
        ...

    def event(self, lane: Lane) -> Any:
        """Happens when all copies started in the lane so far are done."""
        ...

    def wait(self, event: Any, stream: Any) -> None:
        """Makes a stream wait for an event (None: for nothing). The host does not wait."""
        ...


_PAGE = mmap.PAGESIZE


def _unlock(runtime: Any, address: int, memory: torch.Tensor) -> None:
    """Unlocks pages; the memory that they lie in lives until then."""
    runtime.cudaHostUnregister(address)
    del memory


class HostCopies:
    """Copies inside host memory: done at once."""

    def here(self) -> Any:
        """None."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory of the CPU."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor, lane: Lane, after: list) -> None:
        """Copies."""
        target.copy_(source)

    def event(self, lane: Lane) -> Any:
        """None."""

    def wait(self, event: Any, stream: Any) -> None:
        """Nothing to wait for."""


class CudaCopies:
    """Copies over PCIe: a stream per lane, pinned memory of exactly the size asked for.

    PyTorch's own pinned memory is rounded up to powers of two, which may double it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lanes = {lane: torch.cuda.Stream(device) for lane in ("out", "back")}

    def here(self) -> torch.cuda.Stream:
        """The device's current stream."""
        return torch.cuda.current_stream(self.device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Page-locked until it is let go of."""
        # Whole pages of its own: pages are what is locked, and none may be locked twice.
        pages = -(-nbytes // _PAGE) * _PAGE
        whole = torch.empty(pages + _PAGE, dtype=torch.uint8)
        address = -(-whole.data_ptr() // _PAGE) * _PAGE
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(address, pages, 0))
        memory = whole[address - whole.data_ptr() :][:nbytes]
        weakref.finalize(memory, _unlock, runtime, address, whole).atexit = False
        return memory

    def copy(self, target: torch.Tensor, source: torch.Tensor, lane: Lane, after: list) -> None:
        """Queues the copy on the lane's stream."""
        stream = self.lanes[lane]
        stream.wait_stream(self.here())
        for event in after:
            self.wait(event, stream)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def event(self, lane: Lane) -> Any:
        """An event recorded on the lane's stream."""
        return self.lanes[lane].record_event()

    def wait(self, event: Any, stream: Any) -> None:
        """Queues a wait."""
        if event is not None:
            stream.wait_event(event)


def copies_for(device: torch.device) -> Copies:
    """The copies of a device."""
    return CudaCopies(device) if device.type == "cuda" else HostCopies()


@dataclass(eq=False)
class HostBuffer:
    """Host memory, uint8, and the event after which it may be written."""

    memory: torch.Tensor
    free: Any = None


class HostBuffers:
    """Buffers that are used again. There are as many as were ever in use at once.

    Args:
        copies: allocates them.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._free: list[HostBuffer] = []
        self.nbytes = 0

    def take(self, nbytes: int) -> HostBuffer:
        """A buffer of at least so many bytes: the smallest that fits, or a new one in the place of
        the largest that does not."""
        fitting = [b for b in self._free if b.memory.numel() >= nbytes]
        if fitting:
            found = min(fitting, key=lambda b: b.memory.numel())
            self._free.remove(found)
            return found
        if self._free:
            dropped = max(self._free, key=lambda b: b.memory.numel())
            if dropped.free is not None:
                dropped.free.synchronize()
            self._free.remove(dropped)
            self.nbytes -= dropped.memory.numel()
        self.nbytes += nbytes
        return HostBuffer(self._copies.allocate(nbytes))

    def give(self, buffer: HostBuffer) -> None:
        """Takes a buffer back; its last copy may still be under way."""
        self._free.append(buffer)

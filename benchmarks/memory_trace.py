"""Bytes of tensors that a piece of code allocates, seen at the allocator.

On the CPU PyTorch's profiler reports every event of the allocator, those inside of custom operators
and of autograd's threads included; on CUDA the allocator itself counts. Python objects, buffers of
communication libraries and the device's context are not tensors and are not seen.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "ringattn memory: "


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A live allocation: its bytes, and the operators that made it, outermost first."""

    nbytes: int
    path: tuple[str, ...]


@dataclass
class MemoryTrace:
    """The largest number of allocated bytes in each named part of a run.

    Everything from the construction on counts, also what was allocated before a part.

    Attributes:
        peaks: bytes by part.
        largest: what was allocated at the peak of each part (CPU only).
    """

    device: torch.device
    peaks: dict[str, int] = field(default_factory=dict)
    largest: dict[str, tuple[Allocation, ...]] = field(default_factory=dict)

    def run(self, body: Callable[[Callable[[str], Any]], None]) -> "MemoryTrace":
        """Runs ``body(part)``, where ``with part("name"):`` names a part; returns itself."""
        if self.device.type == "cuda":
            body(self._cuda_part)
            return self
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with _quiet():
            profiler.__enter__()
        try:
            body(lambda name: record_function(_MARK + name))
        finally:
            with _quiet():
                profiler.__exit__(None, None, None)
        self._read(profiler)
        return self

    def _cuda_part(self, name: str) -> "_CudaPart":
        return _CudaPart(self, name)

    def _read(self, profiler: Any) -> None:
        events, spans = _events(profiler)
        live: dict[int, Allocation] = {}
        total = 0
        for at, pointer, size, path in sorted(events, key=lambda event: event[0]):
            if size > 0:
                live[pointer] = Allocation(nbytes=size, path=path)
            elif live.pop(pointer, None) is None:
                continue  # was there before
            total += size
            for name, start, stop in spans:
                if start <= at <= stop and total > self.peaks.get(name, 0):
                    self.peaks[name] = total
                    self.largest[name] = tuple(live.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without stderr, where PyTorch's profiler writes a line whenever it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _CudaPart:
    def __init__(self, trace: MemoryTrace, name: str) -> None:
        self._trace, self._name = trace, name

    def __enter__(self) -> None:
        torch.cuda.synchronize(self._trace.device)
        torch.cuda.reset_peak_memory_stats(self._trace.device)

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self._trace.device)
        peak = torch.cuda.max_memory_allocated(self._trace.device)
        self._trace.peaks[self._name] = max(peak, self._trace.peaks.get(self._name, 0))


def _events(profiler: Any) -> tuple[list[tuple[int, int, int, tuple[str, ...]]], list[Any]]:
    """(time, address, signed bytes, operators) of allocations and frees; (part, start, stop)."""
    events, spans = [], []
    stack = [(e, ()) for e in profiler.profiler.kineto_results.experimental_event_tree()]
    while stack:
        event, path = stack.pop()
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size, path))
            continue
        if event.name.startswith(_MARK):
            name = event.name.removeprefix(_MARK)
            spans.append((name, event.start_time_ns, event.end_time_ns))
        stack += [(child, (*path, event.name)) for child in event.children]
    return events, spans

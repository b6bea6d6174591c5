"""The host store: order, bounds, reuse, and waits, with copies that come as late as they may."""

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from ringattn.parallel import offload
from ringattn.parallel.host_memory import HostCopies
from ringattn.parallel.offload import HostStore, Ticket

SIZE = 1024  # float32 of a tensor
LAYERS = 7


class LateCopies(HostCopies):
    """Copies run only when somebody waits for them; a lane keeps its order.

    Sources and targets are held weakly: memory that is given up before its copy is done is seen.
    """

    def __init__(self) -> None:
        self.queued: dict[str, list[Callable[[], None]]] = {"out": [], "back": []}
        self.done = {"out": 0, "back": 0}

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN in every float

    def copy(self, target: torch.Tensor, source: torch.Tensor, lane: Any, after: list) -> None:
        host = target if lane == "out" else source
        device = weakref.ref(source if lane == "out" else target)

        def run() -> None:
            for event in after:
                self.wait(event, None)
            tensor = device()
            assert tensor is not None, f"memory was given up before its copy {lane} was done"
            (host if lane == "out" else tensor).copy_(tensor if lane == "out" else host)

        self.queued[lane].append(run)

    def event(self, lane: Any) -> Any:
        return lane, len(self.queued[lane])

    def wait(self, event: Any, stream: Any) -> None:
        if event is not None:
            lane, count = event
            while self.done[lane] < count:
                self.done[lane] += 1
                self.queued[lane][self.done[lane] - 1]()


def _forward(store: HostStore, layers: int = LAYERS, size: int = SIZE) -> list[list[Ticket]]:
    """Two tensors per layer; their value names them."""
    tickets = []
    for layer in range(layers):
        bundle = store.bundle()
        tickets.append([bundle.put(torch.full((2, size // 2), 10.0 * layer + n)) for n in (0, 1)])
    return tickets


def _backward(store: HostStore, tickets: list[list[Ticket]]) -> None:
    """Takes everything in the opposite order and lets go of it."""
    while tickets:
        layer = len(tickets) - 1
        for number, ticket in enumerate(tickets.pop()):
            value = ticket.get()
            assert value.shape == (2, value.numel() // 2)
            assert torch.equal(value, torch.full_like(value, 10.0 * layer + number))
            assert store.device_bytes <= 4 * value.numel() * 4
    gc.collect()


@pytest.mark.parametrize("copies", [HostCopies, LateCopies])
def test_what_returns_is_what_left(copies: type) -> None:
    store = HostStore(copies())
    for _ in range(3):  # buffers are used again while their last copy may be under way
        tickets = _forward(store)
        assert store.device_bytes <= 4 * SIZE * 4  # two bundles of two tensors
        _backward(store, tickets)
        assert store.device_bytes == 0
        assert store.host_bytes == LAYERS * 2 * SIZE * 4


def test_the_bundle_needed_next_is_on_its_way() -> None:
    copies = LateCopies()
    store = HostStore(copies)
    tickets = _forward(store)
    tickets[4][0].get()
    queued = len(copies.queued["back"])
    assert queued == 3  # the tensor asked for, and both of the layer before
    tickets[3][0].get()
    assert copies.done["back"] >= 2
    assert len(copies.queued["back"]) == queued + 2  # layer 2; layer 3 was on its way


def test_tickets_may_be_used_twice_and_dropped_unused() -> None:
    store = HostStore(LateCopies())
    tickets = _forward(store)
    assert torch.equal(tickets[2][0].get(), tickets[2][0].get())
    assert tickets[6][1].get()[0, 0] == 61.0
    del tickets[3:]
    gc.collect()
    assert tickets[2][1].get()[0, 0] == 21.0
    tickets.clear()
    gc.collect()
    assert store.device_bytes == 0
    _backward(store, _forward(store))


def test_host_memory_follows_the_largest_sizes() -> None:
    """Shares of tokens change from step to step: buffers grow, and are not piled up."""
    store = HostStore(HostCopies())
    for size in (SIZE, SIZE // 2, 2 * SIZE, SIZE + 2, 2 * SIZE):
        _backward(store, _forward(store, size=size))
    assert store.host_bytes == LAYERS * 2 * 2 * SIZE * 4


def test_small_and_strided_tensors() -> None:
    bundle = HostStore(HostCopies()).bundle()
    small, strided = torch.arange(3.0), torch.randn(64, 48).t()
    assert torch.equal(bundle.put(small).get(), small)
    assert torch.equal(bundle.put(strided).get(), strided)


def test_saved_tensors_of_autograd_pass_through() -> None:
    store = HostStore()
    x = torch.randn(64, 64, requires_grad=True)
    want = torch.autograd.grad(x.sin().exp().sum(), x)[0]
    bundle = store.bundle()
    with torch.autograd.graph.saved_tensors_hooks(bundle.put, Ticket.get):
        out = x.sin().exp().sum()
    assert torch.equal(torch.autograd.grad(out, x)[0], want)
    del out, bundle
    gc.collect()
    assert store.device_bytes == 0


@pytest.mark.parametrize("mistake", ["leave at once", "no wait for arrival"])
def test_mistakes_are_seen(mistake: str) -> None:
    """Memory given up too early or values used too early."""

    def leave(self: Any) -> None:
        if self.value is not None:
            self.value = None
            self.store.device_bytes -= self.nbytes

    def get(self: Any) -> torch.Tensor:
        self.fetch()
        self.bundle.fetch_before()
        value, self.value = self.value, None
        return value

    patches = {
        "leave at once": (offload._Entry, "leave", leave),
        "no wait for arrival": (offload._Entry, "get", get),
    }
    store = HostStore(LateCopies())

    def steps() -> None:
        for _ in range(2):
            _backward(store, _forward(store))

    with mock.patch.object(*patches[mistake]), pytest.raises(AssertionError):
        steps()

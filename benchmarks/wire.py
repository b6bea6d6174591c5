"""Counts what a process puts on the wire, by wrapping the calls of torch.distributed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@dataclass
class Wire:
    """Bytes that this rank has sent to other ranks, and received from them."""

    sent: int = 0
    received: int = 0


@contextmanager
def counted_wire(rank: int, world: int) -> Iterator[Wire]:
    """Counts the payload that calls of torch.distributed send to other ranks inside the block.

    Collectives count what the ring algorithm sends, and receives: all-gather (P - 1) inputs,
    reduce-scatter (P - 1) / P of its input, all-reduce both. Broadcast, gather, scatter and reduce
    are refused with a RuntimeError. Not for groups other than that of all ranks.
    """
    wire = Wire()
    with ExitStack() as stack:
        for name, sizes in _COUNTED.items():
            wrapped = _counting(getattr(distributed_c10d, name), sizes, wire, rank, world)
            _patch(stack, name, wrapped)
        for name in _REFUSED:
            _patch(stack, name, _refusing(name))
        yield wire


def _patch(stack: ExitStack, name: str, function: Callable[..., Any]) -> None:
    # Both places: P2POp compares its function with the one in distributed_c10d.
    for module in (dist, distributed_c10d):
        stack.enter_context(patch.object(module, name, function))


def _counting(
    function: Callable[..., Any], sizes: "_Sizes", wire: Wire, rank: int, world: int
) -> Callable[..., Any]:
    sent, received = sizes

    @wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        wire.sent += sent(rank, world, *args, **kwargs)
        wire.received += received(rank, world, *args, **kwargs)
        return function(*args, **kwargs)

    return counting


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        raise RuntimeError(f"torch.distributed.{name} is not counted; add it to the wire count")

    return refuse


def _nothing(*args: Any, **kwargs: Any) -> int:
    del args, kwargs
    return 0


def _receive(rank: int, world: int, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    del world
    source = kwargs.get("group_src", kwargs.get("src", args[0] if args else None))
    return 0 if source == rank else tensor.nbytes


def _send(rank: int, world: int, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    del world
    target = kwargs.get("group_dst", kwargs.get("dst", args[0] if args else None))
    return 0 if target == rank else tensor.nbytes


def _all_to_all_single(
    rank: int,
    world: int,
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    **kwargs: Any,
) -> int:
    del output, output_split_sizes, kwargs
    kept = input_split_sizes[rank] if input_split_sizes else input.shape[0] // world
    return input.nbytes // input.shape[0] * (input.shape[0] - kept) if input.numel() else 0


def _all_to_all_single_received(
    rank: int,
    world: int,
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    **kwargs: Any,
) -> int:
    # The same count with the ends swapped.
    return _all_to_all_single(
        rank, world, input, output, input_split_sizes, output_split_sizes, **kwargs
    )


def _all_to_all_received(
    rank: int, world: int, outputs: Sequence[torch.Tensor], inputs: Any, *_: Any, **kwargs: Any
) -> int:
    return _all_to_all(rank, world, inputs, outputs, **kwargs)


def _all_to_all(rank: int, world: int, outputs: Any, inputs: Sequence[torch.Tensor], *_: Any,
                **kwargs: Any) -> int:  # fmt: skip
    del world, outputs, kwargs
    return sum(x.nbytes for peer, x in enumerate(inputs) if peer != rank)


def _all_gather(rank: int, world: int, output: Any, tensor: torch.Tensor, *_: Any,
                **kwargs: Any) -> int:  # fmt: skip
    del rank, output, kwargs
    return (world - 1) * tensor.nbytes


def _reduce_scatter(rank: int, world: int, output: torch.Tensor, *_: Any, **kwargs: Any) -> int:
    del rank, kwargs
    return (world - 1) * output.nbytes


def _all_reduce(rank: int, world: int, tensor: torch.Tensor, *_: Any, **kwargs: Any) -> int:
    del rank, kwargs
    return 2 * (world - 1) * tensor.nbytes // world


_Sizes = tuple[Callable[..., int], Callable[..., int]]
_COUNTED: dict[str, _Sizes] = {
    "isend": (_send, _nothing),
    "send": (_send, _nothing),
    "irecv": (_nothing, _receive),
    "recv": (_nothing, _receive),
    "all_to_all_single": (_all_to_all_single, _all_to_all_single_received),
    "all_to_all": (_all_to_all, _all_to_all_received),
    "all_gather": (_all_gather, _all_gather),
    "all_gather_into_tensor": (_all_gather, _all_gather),
    "reduce_scatter": (_reduce_scatter, _reduce_scatter),
    "reduce_scatter_tensor": (_reduce_scatter, _reduce_scatter),
    "all_reduce": (_all_reduce, _all_reduce),
}
_REFUSED = ("broadcast", "gather", "scatter", "reduce")

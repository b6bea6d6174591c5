"""The operations per second that a machine could do at most: what MFU is a share of."""

import time
from dataclasses import dataclass

import torch

from ringattn.launch.metrics import peak_flops

_SIZE = 1024
_ROUNDS, _ROUND_S = 5, 0.1


@dataclass(frozen=True)
class PeakRate:
    """What the devices of all ranks together could do.

    Attributes:
        flops: FLOP/s. source: where the figure is from.
        core_flops: of one core, per second of its time; None for GPUs.
    """

    flops: float
    source: str
    core_flops: float | None = None


def peak_rate(device_type: str, ranks: int, threads: int, dtype: torch.dtype) -> PeakRate | None:
    """Of `ranks` GPUs by their data sheet, of `threads` cores of the CPU by a measured product.

    None for a GPU whose data sheet is not known.
    """
    if device_type == "cuda":
        sheet = peak_flops(torch.device("cuda", 0))
        return (
            None
            if sheet is None
            else PeakRate(sheet * ranks, f"data sheet, dense bfloat16, {ranks} GPUs")
        )
    one, name = core_rate(dtype), str(dtype).removeprefix("torch.")
    source = f"measured: {name} matrix product of {_SIZE} on one core, times {threads} cores"
    return PeakRate(one * threads, source, one)


def core_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one thread's matrix products by its CPU time: the best of some rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
        torch.mm(a, b)
        return max(_round(a, b) for _ in range(_ROUNDS))
    finally:
        torch.set_num_threads(threads)


def _round(a: torch.Tensor, b: torch.Tensor) -> float:
    began, products = time.thread_time(), 0
    while (seconds := time.thread_time() - began) < _ROUND_S:
        torch.mm(a, b)
        products += 1
    return products * 2 * _SIZE**3 / seconds

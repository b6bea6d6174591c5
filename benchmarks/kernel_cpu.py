"""CPU time of a kernel on one thread, beside the CPU flash op called tile by tile.

    python -m ringattn.benchmarks.kernel_cpu [kernel]

Prints GFLOP/s by exact area (4 D per pair forward, 10 D backward) and the ratio of CPU times.
The op knows no window, so there it pays the whole triangle. bfloat16, 8 heads of 64. Repetitions
are interleaved and the best counts.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from ringattn.kernels import TILE, kernel_by_name

HEADS, DIM, OPEN, REPEATS = 8, 64, 1 << 40, 3
SCALE = DIM**-0.5
_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_op_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _documents(*lengths: int) -> list[tuple[int, ...]]:
    stops = np.cumsum(lengths).tolist()
    boxes = [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    return [(0, HEADS, a, b, a, b, -OPEN, 0, 1) for a, b in boxes]


CASES: dict[str, list[tuple[int, ...]]] = {
    "local causal of a zigzag shard, 8K": [
        (0, HEADS, 0, 4096, 0, 4096, -OPEN, 0, 1),
        (0, HEADS, 4096, 8192, 0, 4096, -OPEN, OPEN, 1),
        (0, HEADS, 4096, 8192, 4096, 8192, -OPEN, 0, 1),
    ],
    "rectangle 4K x 8K": [(0, HEADS, 0, 4096, 0, 8192, -OPEN, OPEN, 1)],
    "causal window 1024, 16K": [(0, HEADS, 0, 16384, 0, 16384, -1023, 0, 1)],
    "causal documents, long": _documents(5000, 37, 6200, 12, 900, 15, 3000, 1220),
    "causal documents, 1K": _documents(*[1024] * 8),
    "causal documents, tiny": _documents(*[40, 25, 61, 90, 12] * 16),
}


def _area(tiles: np.ndarray) -> int:
    total = 0
    for h0, h1, q0, q1, k0, k1, lo, hi, step in tiles.tolist():
        i = np.arange(q0, q1, step)
        count = np.minimum(k1 - 1, i + hi) - np.maximum(k0, i + lo) + 1
        total += (h1 - h0) * int(np.maximum(count, 0).sum())
    return total


def _best_times(functions: list[Callable[[], None]]) -> list[float]:
    best = [float("inf")] * len(functions)
    for _ in range(REPEATS + 1):
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            best[i] = min(best[i], time.process_time() - start)
    return best


def _measure(kernel_name: str, tiles: np.ndarray) -> list[float]:
    """CPU seconds: kernel forward and backward, op forward and backward."""
    kernel = kernel_by_name(kernel_name)
    rows = int(tiles["q1"].max())
    keys = int(tiles["k1"].max())
    q, k, v, dout = (torch.randn(1, n, HEADS, DIM).bfloat16() for n in (rows, keys, keys, rows))
    prepared = kernel.prepare(tiles, torch.device("cpu"))
    out, lse = torch.zeros(1, rows, HEADS, DIM), torch.empty(1, rows, HEADS)
    grads = [torch.zeros(x.shape) for x in (q, k, v)]

    def forward() -> None:
        lse.fill_(float("-inf"))
        kernel.forward(q, k, v, prepared, out, lse, scale=SCALE, softcap=None)

    forward()
    delta, out_16 = (out * dout).sum(-1), out.bfloat16()

    def backward() -> None:
        kernel.backward(dout, q, k, v, lse, delta, prepared, *grads, scale=SCALE, softcap=None)

    def op(direction: Callable[..., object], of_query: list[torch.Tensor]) -> None:
        for _, _, q0, q1, k0, k1, _, hi, _ in tiles.tolist():
            a = [x[:, q0:q1].transpose(1, 2) for x in of_query]
            b = [x[:, k0:k1].transpose(1, 2) for x in (k, v)]
            operands = [*a, *b] if direction is _op else [a[0], a[1], *b, a[2], a[3]]
            direction(*operands, 0.0, hi < OPEN, scale=SCALE)

    return _best_times(
        [
            forward,
            backward,
            lambda: op(_op, [q]),
            lambda: op(_op_backward, [dout, q, out_16, lse]),
        ]
    )


def main() -> None:
    torch.set_num_threads(1)
    kernel_name = sys.argv[1] if len(sys.argv) > 1 else "cpu_flash"
    print(f"{'':38}{kernel_name} GF/s fwd bwd   op GF/s fwd bwd   time ratio")
    for name, rows in CASES.items():
        tiles = np.array(rows, dtype=TILE)
        times = _measure(kernel_name, tiles)
        flops = [4 * DIM * _area(tiles), 10 * DIM * _area(tiles)] * 2
        rates = [f / t / 1e9 for f, t in zip(flops, times, strict=True)]
        ratio = sum(times[:2]) / sum(times[2:])
        print(
            f"{name:38}{rates[0]:13.0f} {rates[1]:5.0f} {rates[2]:13.0f} {rates[3]:5.0f} "
            f"{ratio:12.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

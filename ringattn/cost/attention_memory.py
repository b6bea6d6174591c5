"""Bytes that a plan's attention needs on a rank, as the executor and the kernels allocate them."""

from dataclasses import replace
from itertools import groupby

import numpy as np

from ringattn.cost.step_shapes import AttentionBytes
from ringattn.schedule import ACCUMULATORS, Schedule, Wire

ALIGN = 64
"""Bytes to which the arena rounds what it hands out."""
WIDE = 4
CPU_CALL_ROWS = 2048
"""Query rows of one call of the CPU kernel, and what it casts or lays out anew at once."""
CPU_COPIES = 24 << 20
CPU_OP_ROWS = 768
"""Tiles with fewer query rows go to batched products in bfloat16's backward: numbers of their
scratch, each twice in float32 and twice in bfloat16."""
CPU_PRODUCTS = 1280 * 512


def arena_bytes(schedule: Schedule, rank: int) -> int:
    """Bytes that one run of a schedule carves from its arena on a rank, per batch element.

    Slots beyond home, and one flat buffer for every message that finds none of those that landed
    large enough. The arena never shrinks: forward and backward share the larger of both.
    """
    mine = schedule.slots[(schedule.slots["rank"] == rank) & (schedule.slots["slot"] > 0)]
    total = 0
    for slot in mine:
        wire = Wire.ACCUMULATOR if slot["channel"] in ACCUMULATORS else Wire.INPUT
        row = schedule.shapes.row_bytes(int(slot["channel"]), schedule.direction, wire)
        if (int(slot["channel"]), int(slot["slot"])) in schedule.saved:
            # What the forward left is not carved again.
            backward = schedule.direction == "backward"
            row -= backward * schedule.shapes.row_bytes(int(slot["channel"]), "forward", Wire.INPUT)
        total += _padded(int(slot["rows"] * slot["heads"]) * row)
    return total + _message_bytes(schedule, rank)


def _message_bytes(schedule: Schedule, rank: int) -> int:
    """Distinct message buffers of a run: posted in order, used again once they have landed."""
    moves = schedule.moves
    index = np.flatnonzero((moves["src"] == rank) | (moves["dst"] == rank))
    sizes = schedule.payload_bytes[index]
    parcels: dict[tuple[int, int, int, int, int], int] = {}
    for move, size in zip(moves[index], sizes, strict=True):
        sends = move["src"] == rank  # a copy from this rank to itself has one buffer
        peer = move["dst"] if sends else move["src"]
        key = (int(move["post"]), int(move["land"]), -int(move["lane"]), int(not sends), int(peer))
        parcels[key] = parcels.get(key, 0) + int(size)
    total, spare, flying = 0, list[int](), dict[int, list[int]]()
    for post, group in groupby(sorted(parcels), key=lambda key: key[0]):
        for land in [land for land in flying if land < post]:
            spare += flying.pop(land)
        for key in group:
            fitting = [size for size in spare if size >= parcels[key]]
            size = min(fitting, default=parcels[key])
            if fitting:
                spare.remove(size)
            else:
                total += _padded(size)
            flying.setdefault(key[1], []).append(size)
    return total


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def attention_bytes(
    schedules: tuple[Schedule, Schedule],
    rank: int,
    rows: int,
    *,
    kernel: str,
    kept_rows: float = 1.0,
) -> AttentionBytes:
    """What a plan needs on a rank beside operands and results, for one batch element.

    Args:
        schedules: forward and backward. rank: whose.
        rows: tokens of the rank's shard.
        kernel: "cpu_flash", "triton", or any other name for the libraries' flash kernels.
        kept_rows: see `AttentionBytes`.
    """
    shapes = schedules[0].shapes
    q, k = rows * shapes.q_heads, rows * shapes.kv_heads
    q_numbers, k_numbers = q * shapes.v_dim, k * shapes.v_dim
    item = shapes.itemsize
    forward, backward = kernel_bytes(kernel, rows, shapes.q_heads, q_numbers, k_numbers, item)
    if kernel == "cpu_flash" and item < WIDE and longest_tile(schedules[1], rank) < CPU_OP_ROWS:
        copies = min(2 * WIDE * (q_numbers + k_numbers), CPU_COPIES)
        backward += copies * item / (2 * WIDE) + 2 * (WIDE + item) * CPU_PRODUCTS
    accumulators = WIDE * (q_numbers + 2 * k_numbers)
    # Results in the input dtype are booked by the layer; float32 ones are the accumulators.
    narrow = item < WIDE
    before = WIDE * q_numbers * (3 if narrow else 1)  # dout * out, summed to delta
    run = 4 * WIDE * q + backward + narrow * (accumulators - item * (q_numbers + 2 * k_numbers))
    return AttentionBytes(
        arena=float(max(arena_bytes(s, rank) for s in schedules)),
        saved=float(schedules[0].saved_bytes(rank)),
        forward=WIDE * q + forward + narrow * (WIDE - item) * q_numbers,
        backward=max(run, before - accumulators + WIDE * q),
        kept_rows=kept_rows,
    )


def longest_tile(schedule: Schedule, rank: int) -> int:
    """Query rows of the longest tile that a rank computes."""
    tasks = schedule.tasks[schedule.tasks["rank"] == rank]
    return int(((tasks["q1"] - tasks["q0"]) // tasks["stride"]).max(initial=0))


def kernel_bytes(
    kernel: str, rows: int, heads: int, q_numbers: float, k_numbers: float, item: int
) -> tuple[float, float]:
    """Scratch of a kernel's forward and backward over `rows` rows.

    The CPU kernel works on a few heads at a time and calls its op on some rows; the libraries'
    kernels return results of their own, which are merged, and keep a float32 dq inside; the band
    kernel adds to the accumulators and needs the rows' statistics only.
    """
    statistics = WIDE * rows * heads
    if kernel == "triton":
        return 0.0, 3.0 * statistics
    if kernel == "cpu_flash":
        part = min(1.0, CPU_CALL_ROWS / max(rows, 1))
        copies = WIDE * (q_numbers + 2 * k_numbers) if item < WIDE else 0.0
        ahead = 2 * WIDE * (q_numbers + k_numbers)
        calls = WIDE * (part * q_numbers + 2 * part * k_numbers)
        return (
            min(copies, CPU_COPIES) + WIDE * part * q_numbers,
            min(ahead, CPU_COPIES) + calls + 2 * statistics,
        )
    forward = (item + WIDE) * q_numbers + 4 * statistics
    results = item * (q_numbers + 2 * k_numbers)
    return forward, 2 * item * q_numbers + results + WIDE * (q_numbers + 2 * k_numbers)


def scaled(bytes_: AttentionBytes, factor: float) -> AttentionBytes:
    """The bytes at `factor` times as many tokens: all of them are per token."""
    return replace(
        bytes_,
        arena=bytes_.arena * factor,
        saved=bytes_.saved * factor,
        forward=bytes_.forward * factor,
        backward=bytes_.backward * factor,
    )

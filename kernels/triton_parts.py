"""What the band kernel's programs share: loading rows, masks, scores.

An operand is a pair (tensor, strides of batch, row and head), the last dim having stride 1. For
loads with TMA, the tensor is a descriptor of blocks (1, rows, 1, padded dim); rows beyond what is
asked for are then whatever lies in memory, and masks keep them out. Kernels take tensors and
strides apart and pair them: the launcher finds no descriptor that lies in a tuple.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
NONE: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def load_work(works):
    """(item, h0, h1, first list) of this program."""
    work = works + 4 * tl.program_id(0)
    return tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc, in float32. The interpreter multiplies only what numpy can: "upcast" is for it."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rows_at(
    operand, batch, start, head, STEP: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr
):
    """Pointers (ROWS,) to element 0 of rows start, start + STEP, …"""
    tensor, strides = operand
    s_batch, s_row, s_head = strides
    base = tensor + tl.cast(batch, tl.int64) * s_batch + tl.cast(head, tl.int64) * s_head
    return base + tl.cast(start, tl.int64) * s_row + tl.arange(0, ROWS).to(OFFSET) * (STEP * s_row)


@triton.jit
def load_rows(
    operand, batch, start, head, end,
    STEP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    OFFSET: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows (ROWS, PADDED) from `start`; without TMA, those from `end` on are 0."""
    if TMA:
        block = operand[0].load([batch, start, tl.cast(head, tl.int32), 0])
        return tl.reshape(block, [ROWS, PADDED])
    else:
        dims = tl.arange(0, PADDED)
        present = (start + tl.arange(0, ROWS) * STEP < end)[:, None]
        if DIM != PADDED:
            present = present & (dims < DIM)[None, :]
        at = rows_at(operand, batch, start, head, STEP, ROWS, OFFSET)
        return tl.load(at[:, None] + dims[None, :], mask=present, other=0.0)


@triton.jit
def inside_band(refs, ref, row, row_end, column, end):
    """bool (rows, columns): which pairs a ref allows, of rows and columns before their ends."""
    at = refs + 6 * ref
    r0, r1, lo, hi = tl.load(at), tl.load(at + 1), tl.load(at + 4), tl.load(at + 5)
    r1 = tl.minimum(r1, row_end)
    distance = column[None, :] - row[:, None]
    inside = (distance >= lo) & (distance <= hi)
    return inside & ((row >= r0) & (row < r1))[:, None] & (column < end)[None, :]


@triton.jit
def run_bounds(refs, ref, row0, row_end, STEP: tl.constexpr):
    """(first, end, full0, full1) of the columns that rows [row0, row_end) visit in a ref.

    A block of columns from `full0` to `full1`, both inclusive, needs no mask.
    """
    at = refs + 6 * ref
    r0, r1, c0, c1 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    lo, hi = tl.load(at + 4), tl.load(at + 5)
    row_last = row_end - STEP
    first = tl.maximum(c0, tl.maximum(row0, r0) + lo)
    first = c0 + (first - c0 + STEP - 1) // STEP * STEP
    end = tl.minimum(c1, tl.minimum(row_last + 1, r1) + hi)
    whole = (r0 <= row0) & (r1 > row_last)
    full1 = tl.where(whole, tl.minimum(c1 - 1, row0 + hi), first - 1)
    return first, end, row_last + lo, full1


@triton.jit
def band_scores(product, scale, softcap, SOFTCAP: tl.constexpr):
    """(value, factor, slope) of q·k products: value * factor is the base-2 score, slope is
    d score / d (scaled product), 1 uncapped.

    tanh by an exponential that overflows to the right limits.
    """
    if SOFTCAP:
        grown = tl.exp2(product * (scale / softcap * (2.0 * LOG2_E)))
        squashed = 1.0 - 2.0 / (1.0 + grown)
        return squashed, softcap * LOG2_E, 1.0 - squashed * squashed
    else:
        return product, scale * LOG2_E, 1.0


@triton.jit
def start_rows(
    operand, batch, start, head, end,
    STEP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    OFFSET: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """What a program's accumulator (ROWS, PADDED) starts from: memory, or 0 where it is SHARED."""
    if SHARED:
        return tl.zeros([ROWS, PADDED], dtype=tl.float32)
    else:
        return load_rows(operand, batch, start, head, end, STEP, DIM, PADDED, ROWS, OFFSET, False)


@triton.jit
def end_rows(
    operand, batch, start, head, end, value,
    STEP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    OFFSET: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Writes rows (ROWS, PADDED) to an accumulator; adds them, by atomics, where it is SHARED."""
    dims = tl.arange(0, PADDED)
    at = rows_at(operand, batch, start, head, STEP, ROWS, OFFSET)[:, None] + dims[None, :]
    stored = (start + tl.arange(0, ROWS) * STEP < end)[:, None] & (dims < DIM)[None, :]
    if SHARED:
        tl.atomic_add(at, value, mask=stored, sem="relaxed")
    else:
        tl.store(at, value, mask=stored)

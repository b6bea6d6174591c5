"""The band kernel's forward, in Triton: one program per block of query rows and head.

A program starts from the partial result (out, lse) of its rows, visits the column blocks of its
item with the online softmax (Milakov and Gimelshein, arXiv 1805.02867; tiled as in
FlashAttention-2, arXiv 2307.08691, algorithm 1) and writes the merged result back, so that a hop
needs no merge of its own. Scores are kept in base 2.

Column blocks come from `refs` (runs of columns, whose blocks the program counts out) or, where
runs are short, from `entries` (one block each: first column, end, and the ref to mask by or -1).
Blocks that lie wholly inside their band skip the mask.
"""

# A jitted function is launched, not called, as far as its type says; inside another it is called.
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from ringattn.kernels.triton_parts import (
    LN_2,
    LOG2_E,
    NONE,
    band_scores,
    dot,
    inside_band,
    load_rows,
    load_work,
    rows_at,
    run_bounds,
)


@triton.jit
def _attend(
    state, q, k, v, at, refs, ref, masked, row, row_end, start, end,
    scale, softcap,
    STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    OFFSET: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One block of columns [start, end) of the online softmax; state: (acc, top, total)."""
    acc, top, total = state
    batch, head = at
    block = load_rows(k, batch, start, head, end, STEP, D, BD, COLUMNS, OFFSET, TMA)
    product = dot(q, tl.trans(block), None, PRECISION)
    value, factor, _ = band_scores(product, scale, softcap, SOFTCAP)
    if masked:
        column = start + tl.arange(0, COLUMNS) * STEP
        value = tl.where(inside_band(refs, ref, row, row_end, column, end), value, NONE)
    new_top = tl.maximum(top, tl.max(value, 1) * factor)
    shift = tl.where(new_top == NONE, 0.0, new_top)  # a row without keys: -inf - (-inf) is NaN
    prob = tl.exp2(value * factor - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(prob, 1)
    block = load_rows(v, batch, start, head, end, STEP, E, BE, COLUMNS, OFFSET, TMA)
    acc = dot(prob.to(block.dtype), block, acc * decay[:, None], PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["range_batch"])
def band_forward(
    q, k, v, out, lse, strides,
    works, items, refs, ranges, entries, range_batch, group, scale, softcap,
    STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LISTED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Grid (works, B); `works` rows: item, query head, _, first list.

    q, k, v, out, lse: tensors of operands as in `triton_parts`, whose strides are in `strides`, in
    this order; out and lse float32 and never descriptors.
    scale is positive.
    """
    q, k, v = (q, strides[0]), (k, strides[1]), (v, strides[2])
    out, lse = (out, strides[3]), (lse, strides[4])
    batch = tl.program_id(1)
    item, head, _, lists = load_work(works)
    row0, count = tl.load(items + 4 * item), tl.load(items + 4 * item + 1)
    row = row0 + tl.arange(0, ROWS) * STEP
    row_end = row0 + count * STEP
    values = tl.arange(0, BE)

    lse_at = rows_at(lse, batch, row0, head, STEP, ROWS, OFFSET)
    old_lse = tl.load(lse_at, mask=row < row_end, other=NONE)
    out_at = rows_at(out, batch, row0, head, STEP, ROWS, OFFSET)[:, None] + values[None, :]
    started = (old_lse > NONE)[:, None] & (values < E)[None, :]
    acc = tl.load(out_at, mask=started, other=0.0)
    state = (acc, old_lse * LOG2_E, tl.where(old_lse > NONE, 1.0, 0.0))
    rows = load_rows(q, batch, row0, head, row_end, STEP, D, BD, ROWS, OFFSET, False)
    at = (batch, head // group)
    if LISTED:
        listed = ranges + 2 * (batch.to(tl.int64) * range_batch + lists + item)
        for n in tl.range(tl.load(listed), tl.load(listed + 1), disable_licm=True):
            start, end = tl.load(entries + 3 * n), tl.load(entries + 3 * n + 1)
            ref = tl.load(entries + 3 * n + 2)
            state = _attend(
                state, rows, k, v, at, refs, ref, ref >= 0, row, row_end, start, end,
                scale, softcap, STEP, D, E, BD, BE, COLUMNS, SOFTCAP, PRECISION, OFFSET, TMA,
            )  # fmt: skip
    else:
        for ref in range(tl.load(items + 4 * item + 2), tl.load(items + 4 * item + 3)):
            first, end, full0, full1 = run_bounds(refs, ref, row0, row_end, STEP)
            for start in tl.range(first, end, COLUMNS * STEP, disable_licm=True):
                masked = (start < full0) | (start + (COLUMNS - 1) * STEP > full1)
                state = _attend(
                    state, rows, k, v, at, refs, ref, masked, row, row_end, start, end,
                    scale, softcap, STEP, D, E, BD, BE, COLUMNS, SOFTCAP, PRECISION, OFFSET, TMA,
                )  # fmt: skip
    acc, top, total = state
    some = total > 0
    total = tl.where(some, total, 1.0)
    merged = tl.where(some, (top + tl.log2(total)) * LN_2, NONE)
    tl.store(lse_at, merged, mask=row < row_end)
    tl.store(out_at, acc / total[:, None], mask=(row < row_end)[:, None] & (values < E)[None, :])

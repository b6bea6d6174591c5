"""The band kernel's forward, in Triton: one program per block of query rows and head.

A program starts from the partial result (out, lse) of its rows, visits the column blocks of its
item with the online softmax (Milakov and Gimelshein, arXiv 1805.02867; tiled as in
FlashAttention-2, arXiv 2307.08691, algorithm 1) and writes the merged result back, so that a hop
needs no merge of its own. Scores are kept in base 2.

Column blocks come from `refs` (runs of columns, whose blocks the program counts out) or, where
runs are short, from `entries` (one block each: first column, end, and the ref to mask by or -1).
Blocks that lie wholly inside their band skip the mask.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
NONE: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def inside_band(refs, ref, row, column):
    """bool (rows, columns): which pairs a ref allows; `row` (rows,) and `column` (columns,)."""
    at = refs + 6 * ref
    r0, r1, lo, hi = tl.load(at), tl.load(at + 1), tl.load(at + 4), tl.load(at + 5)
    distance = column[None, :] - row[:, None]
    return (distance >= lo) & (distance <= hi) & ((row >= r0) & (row < r1))[:, None]


@triton.jit
def run_bounds(refs, ref, row0, row_last, STEP: tl.constexpr):
    """(first, end, full0, full1) of the columns that rows row0 … row_last visit in a ref.

    A block of columns from `full0` to `full1`, both inclusive, needs no mask.
    """
    at = refs + 6 * ref
    r0, r1, c0, c1 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    lo, hi = tl.load(at + 4), tl.load(at + 5)
    first = tl.maximum(c0, tl.maximum(row0, r0) + lo)
    first = c0 + (first - c0 + STEP - 1) // STEP * STEP
    end = tl.minimum(c1, tl.minimum(row_last + 1, r1) + hi)
    whole = (r0 <= row0) & (r1 > row_last)
    full1 = tl.where(whole, tl.minimum(c1 - 1, row0 + hi), first - 1)
    return first, end, row_last + lo, full1


@triton.jit
def squash(score, factor, softcap):
    """tanh(score * factor / softcap), by exponentials that overflow to the right limits."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(score * (factor / softcap * (2.0 * LOG2_E))))


@triton.jit
def load_rows(base, offsets, present, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows (n, PADDED) of which only WIDTH columns exist; rows that are not `present` are 0."""
    if WIDTH == PADDED:
        return tl.load(base + offsets, mask=present[:, None], other=0.0)
    return tl.load(base + offsets, mask=present[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _attend(
    acc,
    top,
    total,
    q,
    k_base,
    v_base,
    k_offsets,
    v_offsets,
    refs,
    ref,
    masked,
    row,
    start,
    end,
    stride_k,
    stride_v,
    scale,
    softcap,
    STEP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of columns [start, end) of the online softmax."""
    column = start + tl.arange(0, COLUMNS) * STEP
    present = column < end
    k = load_rows(
        k_base + tl.cast(start, tl.int64) * stride_k, k_offsets, present, tl.arange(0, BD), D, BD
    )
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        score = squash(score, scale, softcap) * (softcap * LOG2_E)
    else:
        score = score * (scale * LOG2_E)
    if masked:
        allowed = inside_band(refs, ref, row, column) & present[None, :]
        score = tl.where(allowed, score, NONE)
    new_top = tl.maximum(top, tl.max(score, 1))
    shift = tl.where(new_top == NONE, 0.0, new_top)  # a row without keys: -inf - (-inf) is NaN
    prob = tl.exp2(score - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(prob, 1)
    v = load_rows(
        v_base + tl.cast(start, tl.int64) * stride_v, v_offsets, present, tl.arange(0, BE), E, BE
    )
    acc = tl.dot(prob.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def band_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    works,
    items,
    refs,
    ranges,
    entries,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    out_batch,
    out_row,
    out_head,
    lse_batch,
    lse_row,
    lse_head,
    range_batch,
    group,
    scale,
    softcap,
    STEP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LISTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """See the module docstring. Grid (works, B); `works` rows: item, query head, _, list.

    Shapes as in `ringattn.kernels.base`; `group` query heads share a key head. out, lse float32.
    """
    work = works + 4 * tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    item, head = tl.load(work), tl.load(work + 1).to(tl.int64)
    row0, count = tl.load(items + 4 * item), tl.load(items + 4 * item + 1)
    index = tl.arange(0, ROWS)
    dims, value_dims = tl.arange(0, BD), tl.arange(0, BE)
    live = index < count
    wide = index.to(OFFSET)
    row = row0 + index * STEP
    row_last = row0 + (count - 1) * STEP

    q_base = q_ptr + batch * q_batch + head * q_head + row0.to(tl.int64) * q_row
    q = load_rows(q_base, wide[:, None] * (STEP * q_row) + dims[None, :], live, dims, D, BD)
    out_base = out_ptr + batch * out_batch + head * out_head + row0.to(tl.int64) * out_row
    out_offsets = wide[:, None] * (STEP * out_row) + value_dims[None, :]
    lse_base = lse_ptr + batch * lse_batch + head * lse_head + row0.to(tl.int64) * lse_row
    lse = tl.load(lse_base + index * (STEP * lse_row), mask=live, other=NONE)
    acc = load_rows(out_base, out_offsets, lse > NONE, value_dims, E, BE)
    top = lse * LOG2_E
    total = tl.where(lse > NONE, 1.0, 0.0)

    key_head = head // group
    k_base = k_ptr + batch * k_batch + key_head * k_head
    v_base = v_ptr + batch * v_batch + key_head * v_head
    k_offsets = tl.arange(0, COLUMNS).to(OFFSET)[:, None] * (STEP * k_row) + dims[None, :]
    v_offsets = tl.arange(0, COLUMNS).to(OFFSET)[:, None] * (STEP * v_row) + value_dims[None, :]
    if LISTED:
        list_index = tl.load(work + 3)
        at = ranges + 2 * (batch * range_batch + list_index + item)
        for n in range(tl.load(at), tl.load(at + 1)):
            start, end = tl.load(entries + 3 * n), tl.load(entries + 3 * n + 1)
            ref = tl.load(entries + 3 * n + 2)
            acc, top, total = _attend(
                acc,
                top,
                total,
                q,
                k_base,
                v_base,
                k_offsets,
                v_offsets,
                refs,
                ref,
                ref >= 0,
                row,
                start,
                end,
                k_row,
                v_row,
                scale,
                softcap,
                STEP,
                D,
                E,
                BD,
                BE,
                COLUMNS,
                SOFTCAP,
                PRECISION,
            )
    else:
        for ref in range(tl.load(items + 4 * item + 2), tl.load(items + 4 * item + 3)):
            first, end, full0, full1 = run_bounds(refs, ref, row0, row_last, STEP)
            for start in range(first, end, COLUMNS * STEP):
                acc, top, total = _attend(
                    acc,
                    top,
                    total,
                    q,
                    k_base,
                    v_base,
                    k_offsets,
                    v_offsets,
                    refs,
                    ref,
                    (start < full0) | (start + (COLUMNS - 1) * STEP > full1),
                    row,
                    start,
                    end,
                    k_row,
                    v_row,
                    scale,
                    softcap,
                    STEP,
                    D,
                    E,
                    BD,
                    BE,
                    COLUMNS,
                    SOFTCAP,
                    PRECISION,
                )
    some = total > 0
    total = tl.where(some, total, 1.0)
    merged = tl.where(some, (top + tl.log2(total)) * LN_2, NONE)
    tl.store(lse_base + index * (STEP * lse_row), merged, mask=live)
    stored = live[:, None] & (value_dims < E)[None, :]
    tl.store(out_base + out_offsets, acc / total[:, None], mask=stored)

"""The band kernel's backward, in Triton.

`band_backward_keys`: one program per block of key rows and run of query heads that share the key
head; it visits blocks of query rows, keeps dk and dv, and, where asked, adds dq to memory with
atomics (five products a block, dq's order of addition not fixed). `band_backward_queries`: one
program per block of query rows and head for dq alone; both together take seven products, each row
written by one program, so that results repeat bit by bit. Formulas as in FlashAttention-2 (arXiv
2307.08691, section 3.1.2), with the lse and delta of the whole sequence as inputs.

`stats` is float32 (B, Hq, 2, Tq and a block more): lse in base 2, with +inf for rows without keys,
whose probabilities then vanish, and delta.
"""

# A jitted function is launched, not called, as far as its type says; inside another it is called.
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

from ringattn.kernels.triton_parts import (
    band_scores,
    dot,
    end_rows,
    inside_band,
    load_rows,
    load_work,
    run_bounds,
    start_rows,
)


@triton.jit
def _statistic(stats, batch, head, which, row, end, other, TMA: tl.constexpr):
    """lse (which 0) or delta (1) of rows. With TMA those from `end` on are another row's: masks
    keep them out."""
    tensor, strides = stats
    s_batch, s_head, s_which = strides
    base = tensor + tl.cast(batch, tl.int64) * s_batch + tl.cast(head, tl.int64) * s_head
    if TMA:
        return tl.load(base + (which * s_which + row))
    else:
        return tl.load(base + (which * s_which + row), mask=row < end, other=other)


@triton.jit
def _key_block(
    grads, k, v, q, dout, dq, stats, at, refs, ref, masked, row, row_end, start, end,
    scale, softcap,
    STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr, ADD_DQ: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, TMA: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of one block of query rows [start, end) to (dk, dv), and dq in memory."""
    dk, dv = grads
    batch, head = at
    column = start + tl.arange(0, COLUMNS) * STEP
    queries = load_rows(q, batch, start, head, end, STEP, D, BD, COLUMNS, OFFSET, TMA)
    lse = _statistic(stats, batch, head, 0, column, end, float("inf"), TMA)
    product = dot(k, tl.trans(queries), None, PRECISION)
    value, factor, slope = band_scores(product, scale, softcap, SOFTCAP)
    prob = tl.exp2(value * factor - lse[None, :])
    if masked:
        prob = tl.where(inside_band(refs, ref, row, row_end, column, end), prob, 0.0)
    douts = load_rows(dout, batch, start, head, end, STEP, E, BE, COLUMNS, OFFSET, TMA)
    dv = dot(prob.to(douts.dtype), douts, dv, PRECISION)
    dprob = dot(v, tl.trans(douts), None, PRECISION)
    delta = _statistic(stats, batch, head, 1, column, end, 0.0, TMA)
    dscore = (prob * (dprob - delta[None, :]) * slope).to(queries.dtype)
    dk = dot(dscore, queries, dk, PRECISION)
    if ADD_DQ:
        part = dot(tl.trans(dscore), k, None, PRECISION) * scale
        if REDUCE:
            dq[0].atomic_add(
                [batch, start, tl.cast(head, tl.int32), 0],
                tl.reshape(part, [1, COLUMNS, 1, BD]),
            )
        else:
            end_rows(dq, batch, start, head, end, part, STEP, D, BD, COLUMNS, OFFSET, True)
    return dk, dv


@triton.jit(do_not_specialize=["range_batch"])
def band_backward_keys(
    q, k, v, dout, stats, dq, dk, dv, strides,
    works, items, refs, ranges, entries, range_batch, group, scale, softcap,
    STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LISTED: tl.constexpr, SOFTCAP: tl.constexpr,
    ADD_DQ: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
    TMA: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Grid (works, B); `works` rows: item, query heads h0, h1, list.

    Operands as in `band_forward`; dk and dv, float32, are never descriptors. SHARED: several
    programs add to the same rows of dk and dv. REDUCE: dq is a descriptor.
    """
    q, k, v, dout = (q, strides[0]), (k, strides[1]), (v, strides[2]), (dout, strides[3])
    stats, dq, dk, dv = (stats, strides[4]), (dq, strides[5]), (dk, strides[6]), (dv, strides[7])
    batch = tl.program_id(1)
    item, h0, h1, lists = load_work(works)
    row0, count = tl.load(items + 4 * item), tl.load(items + 4 * item + 1)
    row = row0 + tl.arange(0, ROWS) * STEP
    row_end = row0 + count * STEP
    key_head = h0 // group
    keys = load_rows(k, batch, row0, key_head, row_end, STEP, D, BD, ROWS, OFFSET, False)
    values = load_rows(v, batch, row0, key_head, row_end, STEP, E, BE, ROWS, OFFSET, False)
    dk_rows = start_rows(dk, batch, row0, key_head, row_end, STEP, D, BD, ROWS, OFFSET, SHARED)
    dv_rows = start_rows(dv, batch, row0, key_head, row_end, STEP, E, BE, ROWS, OFFSET, SHARED)
    grads = (dk_rows / scale, dv_rows)
    partial = count < ROWS
    for head in range(h0, h1):
        at = (batch, head)
        if LISTED:
            listed = ranges + 2 * (batch.to(tl.int64) * range_batch + lists + item)
            first = tl.load(listed)
            entry = entries + 3 * first
            for _ in tl.range(first, tl.load(listed + 1), disable_licm=True):
                start, end, ref = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
                entry += 3
                grads = _key_block(
                    grads, keys, values, q, dout, dq, stats, at, refs, ref,
                    ref >= 0, row, row_end, start, end, scale, softcap,
                    STEP, D, E, BD, BE, COLUMNS, SOFTCAP, ADD_DQ, PRECISION, OFFSET, TMA,
                    REDUCE,
                )  # fmt: skip
        else:
            for ref in range(tl.load(items + 4 * item + 2), tl.load(items + 4 * item + 3)):
                first, end, full0, full1 = run_bounds(refs, ref, row0, row_end, STEP)
                for start in tl.range(first, end, COLUMNS * STEP, disable_licm=True):
                    masked = (start < full0) | (start + (COLUMNS - 1) * STEP > full1) | partial
                    grads = _key_block(
                        grads, keys, values, q, dout, dq, stats, at, refs, ref,
                        masked, row, row_end, start, end, scale, softcap,
                        STEP, D, E, BD, BE, COLUMNS, SOFTCAP, ADD_DQ, PRECISION, OFFSET, TMA,
                        REDUCE,
                    )  # fmt: skip
    dk_rows, dv_rows = grads[0] * scale, grads[1]
    end_rows(dk, batch, row0, key_head, row_end, dk_rows, STEP, D, BD, ROWS, OFFSET, SHARED)
    end_rows(dv, batch, row0, key_head, row_end, dv_rows, STEP, E, BE, ROWS, OFFSET, SHARED)


@triton.jit
def _query_block(
    dq, q, dout, lse, delta, k, v, at, refs, ref, masked, row, row_end, start, end, scale, softcap,
    STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    OFFSET: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds the gradient through one block of keys [start, end) to dq, which is not yet scaled."""
    batch, head = at
    keys = load_rows(k, batch, start, head, end, STEP, D, BD, COLUMNS, OFFSET, TMA)
    product = dot(q, tl.trans(keys), None, PRECISION)
    value, factor, slope = band_scores(product, scale, softcap, SOFTCAP)
    prob = tl.exp2(value * factor - lse[:, None])
    if masked:
        column = start + tl.arange(0, COLUMNS) * STEP
        prob = tl.where(inside_band(refs, ref, row, row_end, column, end), prob, 0.0)
    values = load_rows(v, batch, start, head, end, STEP, E, BE, COLUMNS, OFFSET, TMA)
    dprob = dot(dout, tl.trans(values), None, PRECISION)
    dscore = (prob * (dprob - delta[:, None]) * slope).to(keys.dtype)
    return dot(dscore, keys, dq, PRECISION)


@triton.jit(do_not_specialize=["range_batch"])
def band_backward_queries(
    q, k, v, dout, stats, dq, strides,
    works, items, refs, ranges, entries, range_batch, group, scale, softcap,
    STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LISTED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, OFFSET: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """See the module docstring. Grid, `works`, operands as in `band_forward`; dq no descriptor."""
    q, k, v, dout = (q, strides[0]), (k, strides[1]), (v, strides[2]), (dout, strides[3])
    stats, dq = (stats, strides[4]), (dq, strides[5])
    batch = tl.program_id(1)
    item, head, _, lists = load_work(works)
    row0, count = tl.load(items + 4 * item), tl.load(items + 4 * item + 1)
    row = row0 + tl.arange(0, ROWS) * STEP
    row_end = row0 + count * STEP
    queries = load_rows(q, batch, row0, head, row_end, STEP, D, BD, ROWS, OFFSET, False)
    douts = load_rows(dout, batch, row0, head, row_end, STEP, E, BE, ROWS, OFFSET, False)
    lse = _statistic(stats, batch, head, 0, row, row_end, float("inf"), False)
    delta = _statistic(stats, batch, head, 1, row, row_end, 0.0, False)
    grad = start_rows(dq, batch, row0, head, row_end, STEP, D, BD, ROWS, OFFSET, False) / scale
    at = (batch, head // group)
    if LISTED:
        listed = ranges + 2 * (batch.to(tl.int64) * range_batch + lists + item)
        for n in tl.range(tl.load(listed), tl.load(listed + 1), disable_licm=True):
            start, end = tl.load(entries + 3 * n), tl.load(entries + 3 * n + 1)
            ref = tl.load(entries + 3 * n + 2)
            grad = _query_block(
                grad, queries, douts, lse, delta, k, v, at, refs, ref, ref >= 0, row, row_end,
                start, end, scale, softcap,
                STEP, D, E, BD, BE, COLUMNS, SOFTCAP, PRECISION, OFFSET, TMA,
            )  # fmt: skip
    else:
        for ref in range(tl.load(items + 4 * item + 2), tl.load(items + 4 * item + 3)):
            first, end, full0, full1 = run_bounds(refs, ref, row0, row_end, STEP)
            for start in tl.range(first, end, COLUMNS * STEP, disable_licm=True):
                masked = (start < full0) | (start + (COLUMNS - 1) * STEP > full1)
                grad = _query_block(
                    grad, queries, douts, lse, delta, k, v, at, refs, ref, masked, row, row_end,
                    start, end, scale, softcap,
                    STEP, D, E, BD, BE, COLUMNS, SOFTCAP, PRECISION, OFFSET, TMA,
                )  # fmt: skip
    end_rows(dq, batch, row0, head, row_end, grad * scale, STEP, D, BD, ROWS, OFFSET, False)

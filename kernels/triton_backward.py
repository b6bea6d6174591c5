"""The band kernel's backward, in Triton.

`band_backward_keys`: one program per block of key rows and run of query heads that share the key
head; it visits blocks of query rows, keeps dk and dv, and, where asked, adds dq to memory with
atomics (five products a block, dq's order of addition not fixed). `band_backward_queries`: one
program per block of query rows and head for dq alone; both together take seven products, each row
written by one program, so that results repeat bit by bit. Formulas as in FlashAttention-2 (arXiv
2307.08691, section 3.1.2), with the lse and delta of the whole sequence as inputs.

lse comes in base 2, with +inf for rows without keys, whose probabilities then vanish.
"""

import triton
import triton.language as tl

from ringattn.kernels.triton_forward import LOG2_E, inside_band, load_rows, run_bounds, squash


@triton.jit
def _scores(product, scale, softcap, SOFTCAP: tl.constexpr):
    """(base-2 scores, d score / d (scaled product)) of q·k products; the slope is 1 uncapped."""
    if SOFTCAP:
        squashed = squash(product, scale, softcap)
        return squashed * (softcap * LOG2_E), 1.0 - squashed * squashed
    else:
        return product * (scale * LOG2_E), 1.0


@triton.jit
def _key_block(
    dk,
    dv,
    k,
    v,
    q_base,
    dout_base,
    stat_base,
    dq_base,
    q_offsets,
    dout_offsets,
    dq_offsets,
    stat_plane,
    refs,
    ref,
    masked,
    row,
    start,
    end,
    q_row,
    dout_row,
    dq_row,
    scale,
    softcap,
    STEP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ADD_DQ: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the gradients of one block of query rows [start, end) to dk, dv, and dq in memory."""
    dims, value_dims = tl.arange(0, BD), tl.arange(0, BE)
    column = start + tl.arange(0, COLUMNS) * STEP
    present = column < end
    q = load_rows(q_base + tl.cast(start, tl.int64) * q_row, q_offsets, present, dims, D, BD)
    lse = tl.load(stat_base + column, mask=present, other=float("inf"))
    product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    score, slope = _scores(product, scale, softcap, SOFTCAP)
    prob = tl.exp2(score - lse[None, :])
    if masked:
        prob = tl.where(inside_band(refs, ref, row, column), prob, 0.0)
    dout = load_rows(
        dout_base + tl.cast(start, tl.int64) * dout_row, dout_offsets, present, value_dims, E, BE
    )
    dv = tl.dot(prob.to(dout.dtype), dout, dv, input_precision=PRECISION)
    delta = tl.load(stat_base + stat_plane + column, mask=present, other=0.0)
    dprob = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dscore = (prob * (dprob - delta[None, :]) * slope).to(q.dtype)
    dk = tl.dot(dscore, q, dk, input_precision=PRECISION)
    if ADD_DQ:
        dq = tl.dot(tl.trans(dscore), k, input_precision=PRECISION) * scale
        stored = present[:, None] & (dims < D)[None, :]
        tl.atomic_add(
            dq_base + tl.cast(start, tl.int64) * dq_row + dq_offsets, dq, mask=stored, sem="relaxed"
        )
    return dk, dv


@triton.jit
def band_backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    stat_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
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
    dout_batch,
    dout_row,
    dout_head,
    stat_plane,
    stat_batch,
    stat_head,
    dq_batch,
    dq_row,
    dq_head,
    dk_batch,
    dk_row,
    dk_head,
    dv_batch,
    dv_row,
    dv_head,
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
    ADD_DQ: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """See the module docstring. Grid (works, B); `works` rows: item, query heads h0 and h1, list.

    stat: float32 (2, B, Hq, Tq), lse in base 2 and delta. dq, dk, dv: float32 accumulators. SHARED:
    several programs add to the same rows of dk and dv.
    """
    work = works + 4 * tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    item, h0, h1 = tl.load(work), tl.load(work + 1), tl.load(work + 2)
    row0, count = tl.load(items + 4 * item), tl.load(items + 4 * item + 1)
    index = tl.arange(0, ROWS)
    dims, value_dims = tl.arange(0, BD), tl.arange(0, BE)
    live = index < count
    wide = index.to(OFFSET)
    row = row0 + index * STEP
    row_last = row0 + (count - 1) * STEP
    origin = row0.to(tl.int64)

    key_head = (h0 // group).to(tl.int64)
    k_base = k_ptr + batch * k_batch + key_head * k_head + origin * k_row
    v_base = v_ptr + batch * v_batch + key_head * v_head + origin * v_row
    k = load_rows(k_base, wide[:, None] * (STEP * k_row) + dims[None, :], live, dims, D, BD)
    v_offsets = wide[:, None] * (STEP * v_row) + value_dims[None, :]
    v = load_rows(v_base, v_offsets, live, value_dims, E, BE)
    dk = tl.zeros([ROWS, BD], dtype=tl.float32)
    dv = tl.zeros([ROWS, BE], dtype=tl.float32)

    column = tl.arange(0, COLUMNS).to(OFFSET)[:, None] * STEP
    q_offsets = column * q_row + dims[None, :]
    dout_offsets = column * dout_row + value_dims[None, :]
    dq_offsets = column * dq_row + dims[None, :]
    for h in range(h0, h1):
        head = tl.cast(h, tl.int64)
        q_base = q_ptr + batch * q_batch + head * q_head
        dout_base = dout_ptr + batch * dout_batch + head * dout_head
        stat_base = stat_ptr + batch * stat_batch + head * stat_head
        dq_base = dq_ptr + batch * dq_batch + head * dq_head
        if LISTED:
            at = ranges + 2 * (batch * range_batch + tl.load(work + 3) + item)
            for n in range(tl.load(at), tl.load(at + 1)):
                start, end = tl.load(entries + 3 * n), tl.load(entries + 3 * n + 1)
                ref = tl.load(entries + 3 * n + 2)
                dk, dv = _key_block(
                    dk,
                    dv,
                    k,
                    v,
                    q_base,
                    dout_base,
                    stat_base,
                    dq_base,
                    q_offsets,
                    dout_offsets,
                    dq_offsets,
                    stat_plane,
                    refs,
                    ref,
                    ref >= 0,
                    row,
                    start,
                    end,
                    q_row,
                    dout_row,
                    dq_row,
                    scale,
                    softcap,
                    STEP,
                    D,
                    E,
                    BD,
                    BE,
                    COLUMNS,
                    SOFTCAP,
                    ADD_DQ,
                    PRECISION,
                )
        else:
            for ref in range(tl.load(items + 4 * item + 2), tl.load(items + 4 * item + 3)):
                first, end, full0, full1 = run_bounds(refs, ref, row0, row_last, STEP)
                for start in range(first, end, COLUMNS * STEP):
                    dk, dv = _key_block(
                        dk,
                        dv,
                        k,
                        v,
                        q_base,
                        dout_base,
                        stat_base,
                        dq_base,
                        q_offsets,
                        dout_offsets,
                        dq_offsets,
                        stat_plane,
                        refs,
                        ref,
                        (start < full0) | (start + (COLUMNS - 1) * STEP > full1),
                        row,
                        start,
                        end,
                        q_row,
                        dout_row,
                        dq_row,
                        scale,
                        softcap,
                        STEP,
                        D,
                        E,
                        BD,
                        BE,
                        COLUMNS,
                        SOFTCAP,
                        ADD_DQ,
                        PRECISION,
                    )
    dk_base = dk_ptr + batch * dk_batch + key_head * dk_head + origin * dk_row
    dv_base = dv_ptr + batch * dv_batch + key_head * dv_head + origin * dv_row
    _add(dk_base, wide, STEP * dk_row, live, dk * scale, dims, D, SHARED)
    _add(dv_base, wide, STEP * dv_row, live, dv, value_dims, E, SHARED)


@triton.jit
def _add(base, index, pitch, live, value, dims, WIDTH: tl.constexpr, SHARED: tl.constexpr):
    """Adds rows to an accumulator; with atomics where it is SHARED."""
    at = base + index[:, None] * pitch + dims[None, :]
    stored = live[:, None] & (dims < WIDTH)[None, :]
    if SHARED:
        tl.atomic_add(at, value, mask=stored, sem="relaxed")
    else:
        tl.store(at, tl.load(at, mask=stored, other=0.0) + value, mask=stored)


@triton.jit
def _query_block(
    dq,
    q,
    dout,
    lse,
    delta,
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
    k_row,
    v_row,
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
    """Adds the gradient through one block of keys [start, end) to dq, which is not yet scaled."""
    column = start + tl.arange(0, COLUMNS) * STEP
    present = column < end
    k = load_rows(k_base + tl.cast(start, tl.int64) * k_row, k_offsets, present, tl.arange(0, BD), D, BD)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    score, slope = _scores(product, scale, softcap, SOFTCAP)
    prob = tl.exp2(score - lse[:, None])
    if masked:
        allowed = inside_band(refs, ref, row, column) & present[None, :]
        prob = tl.where(allowed, prob, 0.0)
    v = load_rows(v_base + tl.cast(start, tl.int64) * v_row, v_offsets, present, tl.arange(0, BE), E, BE)
    dprob = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dscore = (prob * (dprob - delta[:, None]) * slope).to(k.dtype)
    return tl.dot(dscore, k, dq, input_precision=PRECISION)


@triton.jit
def band_backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    stat_ptr,
    dq_ptr,
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
    dout_batch,
    dout_row,
    dout_head,
    stat_plane,
    stat_batch,
    stat_head,
    dq_batch,
    dq_row,
    dq_head,
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
    """See the module docstring. Grid and `works` as in `band_forward`; stat as in the other."""
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
    origin = row0.to(tl.int64)

    q_base = q_ptr + batch * q_batch + head * q_head + origin * q_row
    q = load_rows(q_base, wide[:, None] * (STEP * q_row) + dims[None, :], live, dims, D, BD)
    dout_base = dout_ptr + batch * dout_batch + head * dout_head + origin * dout_row
    dout_offsets = wide[:, None] * (STEP * dout_row) + value_dims[None, :]
    dout = load_rows(dout_base, dout_offsets, live, value_dims, E, BE)
    stat_base = stat_ptr + batch * stat_batch + head * stat_head
    lse = tl.load(stat_base + row, mask=live, other=float("inf"))
    delta = tl.load(stat_base + stat_plane + row, mask=live, other=0.0)
    dq = tl.zeros([ROWS, BD], dtype=tl.float32)

    key_head = head // group
    k_base = k_ptr + batch * k_batch + key_head * k_head
    v_base = v_ptr + batch * v_batch + key_head * v_head
    column = tl.arange(0, COLUMNS).to(OFFSET)[:, None] * STEP
    k_offsets = column * k_row + dims[None, :]
    v_offsets = column * v_row + value_dims[None, :]
    if LISTED:
        at = ranges + 2 * (batch * range_batch + tl.load(work + 3) + item)
        for n in range(tl.load(at), tl.load(at + 1)):
            start, end = tl.load(entries + 3 * n), tl.load(entries + 3 * n + 1)
            ref = tl.load(entries + 3 * n + 2)
            dq = _query_block(
                dq,
                q,
                dout,
                lse,
                delta,
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
                dq = _query_block(
                    dq,
                    q,
                    dout,
                    lse,
                    delta,
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
    dq_base = dq_ptr + batch * dq_batch + head * dq_head + origin * dq_row
    _add(dq_base, wide, STEP * dq_row, live, dq * scale, dims, D, False)

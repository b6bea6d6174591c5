"""The rows of a batched call as views of buffers (B, T, H[, dim]); nothing is copied."""

import torch

from ringattn.kernels.cpu_calls import Call


def query_blocks(x: torch.Tensor, batch: int | None, call: Call, heads: slice) -> torch.Tensor:
    """(problems, heads, rows[, dim]) of a buffer of query rows.

    `batch` selects one batch row, whose problems become the leading dim. With None, which needs
    a call of one problem, the batch is the leading dim.
    """
    return _blocks(x, batch, (call.q0, call.q_stride, call.rows), call, heads)


def key_blocks(x: torch.Tensor, batch: int | None, call: Call, heads: slice) -> torch.Tensor:
    """(problems, heads, keys[, dim]) of a buffer of key rows; see `query_blocks`."""
    return _blocks(x, batch, (call.k0, call.k_stride, call.keys), call, heads)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with its last dim contiguous, as the op needs it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def batch_rows(call: Call, batch: int) -> tuple[int | None, ...]:
    """The values of `batch` that together cover a buffer with that many batch rows."""
    return (None,) if call.count == 1 else tuple(range(batch))


def add_to_keys(
    into: torch.Tensor, part: torch.Tensor, batch: int | None, call: Call, heads: slice
) -> None:
    """Adds (problems, heads, keys, dim) to a call's key rows, also where problems share rows."""
    target = key_blocks(into, batch, call, heads)
    if not call.keys_overlap:
        target.add_(part)
        return
    for problem in range(call.count):
        target[problem].add_(part[problem])


def _blocks(
    x: torch.Tensor, batch: int | None, rows: tuple[int, int, int], call: Call, heads: slice
) -> torch.Tensor:
    origin, stride, count = rows
    s_batch, s_row, s_head, *s_dim = x.stride()
    head_step = heads.step or 1
    lead = (x.shape[0], s_batch) if batch is None else (call.count, stride * s_row)
    offset = x.storage_offset() + origin * s_row + heads.start * s_head + (batch or 0) * s_batch
    return x.as_strided(
        (lead[0], len(range(heads.start, heads.stop, head_step)), count, *x.shape[3:]),
        (lead[1], head_step * s_head, call.step * s_row, *s_dim),
        offset,
    )

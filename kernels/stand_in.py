"""A stand-in output for attention backward ops that recompute delta from `out`.

Such an op wants only rowsum(dout * out). dout * delta / |dout|^2 has that sum, whatever part of the
keys the op sees, so it carries the delta of the whole sequence into an op that knows none. In 16
bits it costs what rounding the true output costs.

There are two makers: one for 16-bit operands on a device, which the host does not wait for, and one
in the accumulator's dtype that looks at the values first, because on a CPU the passes that most
inputs do not need cost more than looking.
"""

import torch

SAFE_NORM = 1e15
"""The square of a larger norm, or of one below its inverse, is near the end of float32's range."""

SHIFT, LEAST = 60, -126
SHIFT_FLOAT16, LEAST_FLOAT16 = 14, -24
"""The entry that a silent row gets is this many powers of two below delta, and no smaller than the
least power that the dtype holds. float16 ends at 2^16."""


def device_stand_in(dout: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dout', out') in dout's dtype with rowsum(dout' * out') = delta, without a host sync.

    Args:
        dout: (..., E). dout' is a copy of it; a zero row whose delta is not zero (a gradient of
            lse alone) gets one entry of |delta| * 2^-60 (2^-14 in float16), too small to matter.
        delta: (...), the accumulator's dtype.

    Norms are taken in float64, whose range holds the square of every 16-bit and float32 number.
    """
    square = torch.linalg.vector_norm(dout, dim=-1, keepdim=True, dtype=torch.float64).square_()
    delta = delta.unsqueeze(-1)
    silent = (square == 0) & (delta != 0)
    short = dout.dtype == torch.float16
    shift, least = (SHIFT_FLOAT16, LEAST_FLOAT16) if short else (SHIFT, LEAST)
    exponent = (torch.frexp(delta).exponent - shift).clamp_(min=least)
    entry = torch.ldexp(torch.ones_like(delta), exponent)
    factor = torch.where(square == 0, 0.0, delta.double() / square)
    wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
    dout = dout.clone(memory_format=torch.contiguous_format)
    out = torch.mul(dout, factor.to(wide), out=torch.empty_like(dout))  # wide only in registers
    dout[..., :1] = torch.where(silent, entry.to(dout.dtype), dout[..., :1])
    out[..., :1] = torch.where(silent, (delta / entry).to(dout.dtype), out[..., :1])
    return dout, out


def stand_in_out(dout: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dout', out') with rowsum(dout' * out') = delta, for an op that recomputes delta.

    out' = dout * delta / |dout|^2. dout' is dout, except that a zero row whose delta is not zero
    (a gradient of lse alone) gets one entry too small to matter elsewhere. Where the square of a
    norm would leave the range, the row is divided by its largest entry first. What a row gets
    depends on that row alone: buffers may hold rows that nothing has filled yet.
    """
    delta = delta.unsqueeze(-1)
    norm = torch.linalg.vector_norm(dout, dim=-1, keepdim=True)
    safe = (norm > 1 / SAFE_NORM) & (norm < SAFE_NORM)
    plain = dout * (delta / norm.square_())
    if bool(safe.all()):
        return dout, plain
    top = dout.abs().amax(-1, keepdim=True)
    silent = (top == 0) & (delta != 0)
    if bool(silent.any()):
        tiny = torch.finfo(dout.dtype).tiny ** 0.5
        dout = dout.clone()
        dout[..., :1].masked_fill_(silent, tiny)
        top = top.masked_fill(silent, tiny)
    top.masked_fill_(top == 0, 1.0)
    unit = dout / top
    square = unit.square().sum(-1, keepdim=True).clamp_min_(1.0)
    return dout, torch.where(safe, plain, unit.mul_(delta / top / square))

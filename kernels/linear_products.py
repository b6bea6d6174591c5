"""The three matrix products of an output head: 16-bit operands, wide results.

On CUDA the products themselves write float32. The CPU has no such product: there logits are
computed in the wide dtype from weights that are widened block by block, while the two gradient
products keep bfloat16 operands, and each is rounded once before it is added up in the wide dtype.

Shapes: x (R, C), weight (V, C), logits and dlogits (R, V). Wide is float32, or float64.
"""

from collections.abc import Iterator

import torch

BLOCK = 1 << 22
"""Numbers of a weight, or of a weight gradient, that are held once more in another dtype."""


def logits_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """out = x weight'. x and weight have one dtype, out is wide."""
    if x.dtype != out.dtype and x.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
        return
    x = x.to(out.dtype)
    for part in _parts(weight, whole=weight.dtype == out.dtype):
        torch.mm(x, weight[part].to(out.dtype).T, out=out[:, part])


def hidden_grad(dlogits: torch.Tensor, weight: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """dlogits weight, wide. A weight of another dtype than dlogits is converted by blocks."""
    if dlogits.dtype != wide and dlogits.is_cuda:
        return torch.mm(dlogits, weight, out_dtype=wide)
    if dlogits.dtype == weight.dtype:
        return torch.mm(dlogits, weight).to(wide)
    out = dlogits.new_zeros((len(dlogits), weight.shape[1]))
    for part in _parts(weight, whole=False):
        out.addmm_(dlogits[:, part], weight[part].to(out.dtype))
    return out


def add_weight_grad(out: torch.Tensor, dlogits: torch.Tensor, x: torch.Tensor) -> None:
    """out += dlogits' x. dlogits and x have one dtype, out is wide."""
    if dlogits.dtype == out.dtype:
        out.addmm_(dlogits.T, x)
        return
    if x.is_cuda:
        torch.addmm(out, dlogits.T, x, out_dtype=out.dtype, out=out)
        return
    for part in _parts(out, whole=False):
        out[part] += torch.mm(dlogits[:, part].T, x)


def _parts(weight: torch.Tensor, *, whole: bool) -> Iterator[slice]:
    classes, dim = weight.shape
    size = max(1, classes if whole else BLOCK // max(1, dim))
    for start in range(0, classes, size):
        yield slice(start, min(start + size, classes))

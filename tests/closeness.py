"""Relative error of a tensor against a reference, with the tensor's name in the message."""

import math

import torch


def rel_error(ref: torch.Tensor, got: torch.Tensor) -> float:
    """Returns ||got - ref|| / ||ref|| (2-norms, in float64).

    Infinities (a log-sum-exp of -inf) must stand in the same places with the same sign and are
    left out of the norms. A reference of norm zero gives ||got||. A NaN or a misplaced infinity
    on either side gives ``inf``. Raises AssertionError when the shapes differ.
    """
    assert ref.shape == got.shape, f"shape {tuple(got.shape)}, reference {tuple(ref.shape)}"
    ref, got = ref.detach().double().cpu(), got.detach().double().cpu()
    infinite = ref.isinf()
    if ref.isnan().any() or got.isnan().any() or not torch.equal(infinite, got.isinf()):
        return math.inf
    if not torch.equal(ref[infinite], got[infinite]):
        return math.inf
    ref, got = ref[~infinite], got[~infinite]
    difference, norm = (got - ref).norm().item(), ref.norm().item()
    return difference / norm if norm > 0 else difference


def assert_close(name: str, ref: torch.Tensor, got: torch.Tensor, rel: float) -> None:
    """Fails, naming the tensor and its worst element, unless ``rel_error(ref, got) <= rel``."""
    assert ref.shape == got.shape, f"{name}: shape {tuple(got.shape)}, reference {tuple(ref.shape)}"
    error = rel_error(ref, got)
    if error <= rel:
        return
    gap = (got.detach().double().cpu() - ref.detach().double().cpu()).abs()
    same_infinity = (ref == got).cpu()
    flat = int(gap.masked_fill(same_infinity, 0.0).nan_to_num(nan=math.inf).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ref.shape))
    raise AssertionError(
        f"{name}: relative error {error:.3e} > {rel:.1e}; worst at {at}: "
        f"got {got[at].item():.9g}, reference {ref[at].item():.9g}"
    )

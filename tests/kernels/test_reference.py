"""The dense reference against autograd of its own definition, and its edge rows."""

import pytest
import torch

from ringattn.kernels import dense_attention
from tests.closeness import assert_close


def _operands(
    generator: torch.Generator, heads: tuple[int, int], dims: tuple[int, int]
) -> list[torch.Tensor]:
    shapes = [(2, 9, heads[0], dims[0]), (2, 7, heads[1], dims[0]), (2, 7, heads[1], dims[1])]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no-sinks", "sinks"])
def test_gradients_are_those_of_autograd(
    generator: torch.Generator, softcap: float | None, with_sinks: bool
) -> None:
    q, k, v = _operands(generator, (4, 2), (5, 3))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    allowed = torch.rand(4, 9, 7, generator=generator) < 0.6
    allowed[:, 0] = True
    allowed[:, 4] = with_sinks & allowed[:, 4] | ~torch.tensor(with_sinks)
    score = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 5**0.5
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~allowed, float("-inf"))
    columns = torch.cat([score, sinks.view(1, 4, 1, 1).expand(2, 4, 9, 1)], dim=-1)
    prob = torch.softmax(columns if with_sinks else score, dim=-1).nan_to_num(0.0)[..., :7]
    out = torch.einsum("bhij,bjhd->bihd", prob, v.repeat_interleave(2, 2))
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(
        (out * dout).sum(), (q, k, v, sinks) if with_sinks else (q, k, v), allow_unused=True
    )
    got = dense_attention(
        q.detach(),
        k.detach(),
        v.detach(),
        allowed,
        dout,
        softcap=softcap,
        sinks=sinks.detach() if with_sinks else None,
    )
    assert_close("out", out, got.out, 1e-14)
    for name, ref, grad in zip(("dq", "dk", "dv", "dsinks"), wanted, got[2:], strict=False):
        assert grad is not None
        assert_close(name, ref.nan_to_num(0.0), grad, 1e-13)


def test_row_without_keys_is_zero_and_has_no_nan(generator: torch.Generator) -> None:
    q, k, v = (x.detach() for x in _operands(generator, (2, 2), (4, 4)))
    allowed = torch.ones(9, 7, dtype=torch.bool)
    allowed[3] = False
    got = dense_attention(q, k, v, allowed, torch.ones_like(q))
    assert got.dq is not None
    assert torch.equal(got.out[:, 3], torch.zeros_like(got.out[:, 3]))
    assert torch.equal(got.lse[:, 3], torch.full_like(got.lse[:, 3], float("-inf")))
    assert torch.equal(got.dq[:, 3], torch.zeros_like(got.dq[:, 3]))
    for tensor in (got.out, got.dq, got.dk, got.dv):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


def test_without_dout_there_are_no_gradients(generator: torch.Generator) -> None:
    q, k, v = (x.detach() for x in _operands(generator, (2, 1), (4, 4)))
    got = dense_attention(q, k, v, torch.ones(9, 7, dtype=torch.bool))
    assert got[2:] == (None, None, None, None)

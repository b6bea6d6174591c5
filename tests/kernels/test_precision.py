"""16-bit and float32 error of tiled launches, no worse than 1.1 x one shot of the CPU flash op."""

import pytest
import torch

from ringattn.kernels import dense_attention, kernel_by_name
from ringattn.kernels.stand_in import stand_in_out
from tests.closeness import rel_error
from tests.kernels.problems import OPEN, Problem, run_kernel, tile_table

BAR = 1.1
Row = tuple[int, ...]


def _zigzag_hop(heads: int, ranks: int, mine: int, other: int, chunk: int) -> list[Row]:
    """Tiles in full coordinates of one hop: rank `mine` attends the keys of rank `other`."""
    rows = []
    for a in (mine, 2 * ranks - 1 - mine):
        for b in (other, 2 * ranks - 1 - other):
            box = (a * chunk, (a + 1) * chunk, b * chunk, (b + 1) * chunk)
            if b < a:
                rows.append((0, heads, *box, -OPEN, OPEN, 1))
            elif a == b:
                rows.append((0, heads, *box, -OPEN, 0, 1))
    return rows


def _one_shot(p: Problem) -> dict[str, torch.Tensor]:
    q, k, v, dout = (x.transpose(1, 2) for x in (p.q, p.k, p.v, p.dout))
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    op_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, lse = op(q, k, v, 0.0, True)
    grads = op_backward(dout, q, k, v, out, lse, 0.0, True)
    names = ("out", "dq", "dk", "dv")
    return {n: x.transpose(1, 2) for n, x in zip(names, (out, *grads), strict=True)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("seq_len", "ranks", "heads"),
    [
        (320, 2, (4, 4)),
        (320, 4, (4, 1)),
        (2048, 2, (2, 1)),
        pytest.param(2048, 4, (4, 4), marks=pytest.mark.full),
        pytest.param(8192, 2, (2, 2), marks=pytest.mark.full),
    ],
)
def test_no_worse_than_one_shot(
    generator: torch.Generator,
    dtype: torch.dtype,
    seq_len: int,
    ranks: int,
    heads: tuple[int, int],
) -> None:
    """Each tensor, rounded to the input dtype, against one shot of the op in that dtype."""
    dim = 64
    shapes = [(1, seq_len, h, dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, dout = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    p = Problem(tile_table(), q, k, v, dout, torch.empty(0), dim**-0.5)
    launches = [
        tile_table(*_zigzag_hop(heads[0], ranks, mine, (mine - hop) % ranks, seq_len // 2 // ranks))
        for hop in range(ranks)
        for mine in range(ranks)
    ]
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    reference, one_shot = dense_attention(q, k, v, causal, dout), _one_shot(p)
    for name in ("matmul", "cpu_flash"):
        got = run_kernel(kernel_by_name(name), p, launches)
        errors = {
            tensor: rel_error(getattr(reference, tensor), got[tensor].to(dtype))
            / rel_error(getattr(reference, tensor), one_shot[tensor])
            for tensor in one_shot
        }
        assert max(errors.values()) <= BAR, (name, errors)


def test_large_bf16_triangles_are_no_worse_than_one_shot(generator: torch.Generator) -> None:
    """Triangles large enough for the op's causal flag in the backward, beside smaller leftovers."""
    seq_len, heads, dim = 3300, 1, 64
    q, k, v, dout = (
        torch.randn(1, seq_len, heads, dim, generator=generator).bfloat16() for _ in range(4)
    )
    tiles = tile_table((0, heads, 0, seq_len, 0, seq_len, -OPEN, 0, 1))
    p = Problem(tiles, q, k, v, dout, torch.empty(0), dim**-0.5)
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    reference, one_shot = dense_attention(q, k, v, causal, dout), _one_shot(p)
    got = run_kernel(kernel_by_name("cpu_flash"), p, [tiles])
    for tensor, baseline in one_shot.items():
        ref = getattr(reference, tensor)
        error = rel_error(ref, got[tensor].bfloat16())
        assert error <= BAR * rel_error(ref, baseline), tensor


@pytest.mark.parametrize("beside", [0.0, 1e30, float("nan"), float("inf")])
def test_a_row_does_not_depend_on_the_rows_beside_it(beside: float) -> None:
    """Buffers hold rows that nothing has filled: they must not change the bits of others."""
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(1, 9, 2, 16, generator=generator)
    delta = torch.randn(1, 9, 2, generator=generator)
    alone = stand_in_out(dout, delta)
    garbage = torch.full((1, 3, 2, 16), beside)
    mixed = stand_in_out(torch.cat([dout, garbage], 1), torch.cat([delta, delta[:, :3]], 1))
    for x, y in zip(alone, mixed, strict=True):
        assert torch.equal(x, y[:, :9])

"""Gradients of ranks that used different parameters, and of 16 bits, are those of one device."""

from typing import Any

import torch
from torch import nn

from ringattn import hf
from ringattn.context import ContextParallel
from tests.ranks import run_ranks

WORLD = 3
SMALL = 2.0**-8  # half of bfloat16's step at 1: adding one after the other to 1 loses each


def _sum(rank: int, _world: int, group: Any) -> dict[str, torch.Tensor | None]:
    names = ("every", "one_rank", "no_rank", "frozen")
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.ones(12, dtype=torch.bfloat16)) for name in names}
    )
    model["wide"] = nn.Parameter(torch.ones(5, dtype=torch.float64))
    model["frozen"].requires_grad_(False)
    large = torch.arange(12) % WORLD == rank
    model["every"].grad = torch.where(large, 1.0, SMALL).bfloat16()
    model["wide"].grad = torch.full((5,), 1 + 2.0**-40, dtype=torch.float64)
    if rank == 1:
        model["one_rank"].grad = torch.arange(12).bfloat16()
    parallel = hf.Attached(model, ContextParallel(group, heads=(2, 2), head_dim=8), [])
    parallel.sum_gradients()
    return {name: parameter.grad for name, parameter in model.items()}


def test_sums_of_gradients() -> None:
    for grads in run_ranks(WORLD, _sum):
        assert grads["no_rank"] is None
        assert grads["frozen"] is None
        assert grads["one_rank"] is not None
        assert torch.equal(grads["one_rank"], torch.arange(12).bfloat16())
        expected = torch.full((12,), 1 + 2 * SMALL, dtype=torch.bfloat16)
        assert grads["every"] is not None
        assert grads["every"].dtype == torch.bfloat16
        assert torch.equal(grads["every"], expected)
        assert grads["wide"] is not None
        assert torch.equal(grads["wide"], torch.full((5,), 3 + 3 * 2.0**-40, dtype=torch.float64))

"""Whether the `flash_attn` kernels under two of the peers run on a device and a dtype."""

import importlib

import torch

from ringattn.benchmarks.peers.base import Shape
from ringattn.benchmarks.peers.packages import call_refusal

ROWS = 16


def flash_refusal(shape: Shape) -> str | None:
    """Why `flash_attn` cannot run such inputs here, found by a call of `ROWS` tokens."""

    def call() -> None:
        function = importlib.import_module("flash_attn").flash_attn_func
        q, k, v, _ = (x.requires_grad_() for x in shape.inputs(ROWS))
        torch.autograd.grad(function(q, k, v, causal=True).sum(), (q, k, v))

    return call_refusal(f"flash_attn on {shape.device} in {shape.dtype}", call)

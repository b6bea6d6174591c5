"""PyTorch's own context parallel: SDPA with rotating keys, or FlexAttention with gathered ones.

Both shard by `_context_parallel_shard` and wrap a module by `_ContextParallel`, the way PyTorch's
own trainers do. SDPA has full and causal, the latter head-tail balanced; Flex has any mask, its
blocks dealt out by processing time. What they send goes through functional collectives, which the
wire count does not see. Balancing is global state of the package, so each run sets it again.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn.benchmarks.peers.base import Prepared, Shape, prepare_autograd
from ringattn.benchmarks.peers.cases import MaskCase, allowed_block
from ringattn.benchmarks.peers.packages import call_refusal, import_refusal
from ringattn.benchmarks.peers.patterns import CAUSAL, FULL, WINDOW

MODULE = "torch.distributed.tensor.experimental._context_parallel"
BLOCK = 128  # rows and keys of a block of FlexAttention's masks
MOST_MASK_BYTES = 4 << 30
DIMS = (2, 2, 2, 2)  # the tokens' of q, k, v, dout (B, heads, S, D)


@dataclass(frozen=True)
class TorchContextParallel:
    """See the module docstring. Implements `base.Contender`; `attention` is "sdpa" or "flex"."""

    attention: str
    package: str = "torch"

    @property
    def name(self) -> str:
        """Unique in a comparison."""
        return f"torch_cp_{self.attention}"

    def installed(self) -> str | None:
        """Version of PyTorch."""
        return torch.__version__

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs an operator that is sharded and has a backward here, a mask and a length for it."""
        missing = import_refusal(self.package, (MODULE,), "install a newer PyTorch")
        if missing or case.unfit:
            return missing or case.unfit
        if self.attention == "sdpa":
            return _sdpa_mask_refusal(case, world) or _sdpa_refusal(case, shape)
        return _flex_mask_refusal(case, shape, world) or _flex_refusal(shape)

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        del rank
        cp = importlib.import_module(MODULE)
        mesh = dist.init_device_mesh(shape.device, (world,), mesh_dim_names=("cp",))
        whole = tuple(x.transpose(1, 2) for x in shape.inputs(case.seq_len))
        if self.attention == "sdpa":
            balancer, mask = None, None
            if case.pattern == CAUSAL:
                balancer = cp._HeadTailLoadBalancer(case.seq_len, world, shape.device)
            module, note = _sdpa_module(case), "SDPA"
            cp._enable_context_parallel_dispatcher()
        else:
            mask = _block_mask(case, shape)
            uniform = mask.kv_num_blocks.shape[1] == 1
            balancer = cp._PTRRLoadBalancer(mask, world) if uniform else None
            (mask,) = cp._context_parallel_shard(mesh, (mask,), (2,), balancer)
            module, note = _flex_module(shape, mask), "FlexAttention, block mask"
        kind = cp._ContextParallel.AttentionType[self.attention.upper()]
        importlib.import_module("torch.distributed.tensor.parallel").parallelize_module(
            module, mesh, cp._ContextParallel(seq_dim=2, attention_type=kind)
        )
        tokens = torch.arange(case.seq_len, device=shape.device)[None]
        *inputs, held = cp._context_parallel_shard(mesh, (*whole, tokens), (*DIMS, 1), balancer)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cp._cp_options.enable_load_balance = balancer is not None
            return module(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        local = tuple(x.transpose(1, 2).contiguous() for x in inputs)
        note += f", {type(balancer).__name__.strip('_')}" if balancer else ", contiguous"
        positions = held[0].long().cpu().numpy()
        return prepare_autograd(positions, attend, local, note, counted=False)


def _sdpa_mask_refusal(case: MaskCase, world: int) -> str | None:
    if case.pattern not in (FULL, CAUSAL):
        return f"its SDPA has full and causal, no mask like {case.name}"
    parts = 2 * world if case.pattern == CAUSAL else world
    if case.seq_len % parts:
        return f"{case.seq_len} tokens do not divide into {parts} chunks"
    return None


class _Calls(TorchDispatchMode):
    """Keeps the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _sdpa_refusal(case: MaskCase, shape: Shape) -> str | None:
    """Whether the operator that SDPA picks here is one that context parallel shards."""
    handled = importlib.import_module(f"{MODULE}._attention").custom_ops
    q, k, v, _ = (x.transpose(1, 2).requires_grad_() for x in shape.inputs(BLOCK))
    calls = _Calls()
    with calls:
        _sdpa(q, k, v, case.pattern == CAUSAL)
    if handled.keys() & set(calls.seen):
        return None
    attention = [str(op) for op in calls.seen if "attention" in str(op)]
    return (
        f"context parallel shards no operator that SDPA calls on {shape.device} in {shape.dtype}: "
        f"{', '.join(attention) or 'plain products'}"
    )


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _flex_mask_refusal(case: MaskCase, shape: Shape, world: int) -> str | None:
    if case.seq_len % (world * BLOCK):
        return f"{case.seq_len} tokens do not divide among {world} ranks in blocks of {BLOCK}"
    layers = 1 if case.mask().is_uniform else shape.q_heads
    size = layers * case.seq_len**2
    if size > MOST_MASK_BYTES and not _has_mask_mod(case):
        return f"its mask function would need a table of {size / 2**30:.0f} GiB"
    return None


def _flex_refusal(shape: Shape) -> str | None:
    flex = importlib.import_module("torch.nn.attention.flex_attention").flex_attention

    def call() -> None:
        q, k, v, _ = (x.transpose(1, 2).requires_grad_() for x in shape.inputs(BLOCK))
        out = flex(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        torch.autograd.grad(out.sum(), (q, k, v))

    return call_refusal(f"FlexAttention on {shape.device} in {shape.dtype}", call)


def _sdpa_module(case: MaskCase) -> torch.nn.Module:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return _sdpa(q, k, v, case.pattern == CAUSAL)

    return Attention()


def _flex_module(shape: Shape, mask: Any) -> torch.nn.Module:
    flex = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    # Not compiled it holds all scores at once; on a CPU it is for checks, and compiling takes long.
    function = torch.compile(flex, dynamic=False) if shape.device == "cuda" else flex

    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            grouped = shape.q_heads != shape.kv_heads
            return function(q, k, v, block_mask=mask, enable_gqa=grouped)

    return Attention()


def _has_mask_mod(case: MaskCase) -> bool:
    return case.pattern in (FULL, CAUSAL, WINDOW) or case.is_packed


def _block_mask(case: MaskCase, shape: Shape) -> Any:
    """The mask of the whole sequence; a function of positions where the pattern has one."""
    create = importlib.import_module("torch.nn.attention.flex_attention").create_block_mask
    heads = None if case.mask().is_uniform else shape.q_heads
    size = case.seq_len
    return create(_mask_mod(case, shape), None, heads, size, size, device=shape.device)


def _mask_mod(case: MaskCase, shape: Shape) -> Any:
    before, ahead = case.window - 1, case.ahead
    if case.pattern == FULL:
        return lambda b, h, q, k: q >= 0
    if case.pattern == CAUSAL:
        return lambda b, h, q, k: k <= q
    if case.pattern == WINDOW:
        return lambda b, h, q, k: (k <= q + ahead) & (k >= q - before)
    if case.is_packed:
        numbers = np.repeat(np.arange(len(case.lengths)), case.lengths)
        document = torch.from_numpy(numbers).to(shape.device)
        if case.causal:
            return lambda b, h, q, k: (document[q] == document[k]) & (k <= q)
        return lambda b, h, q, k: document[q] == document[k]
    every = range(case.seq_len)
    table = torch.from_numpy(allowed_block(case.mask(), every, every, shape.q_heads))
    table = table.to(shape.device)
    if table.ndim == 2:
        return lambda b, h, q, k: table[q, k]
    return lambda b, h, q, k: table[h, q, k]

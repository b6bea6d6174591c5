"""MagiAttention: `calc_attn` over its own dispatch of the sequence, masks as attention slices."""

import importlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ringattn.benchmarks.peers.attention_slices import attention_slices, slices_refusal
from ringattn.benchmarks.peers.base import Prepared, Shape, prepare_autograd
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.peers.packages import call_refusal, import_refusal, installed_version

API = "magi_attention.api"
INSTALL = "build it from github.com/SandAI-org/MagiAttention (needs Hopper or Blackwell)"
ROWS = 128


@dataclass(frozen=True)
class MagiAttention:
    """See the module docstring. Implements `base.Contender`."""

    name: str = "magi_attention"
    package: str = "magi_attention"

    def installed(self) -> str | None:
        """Version of MagiAttention."""
        return installed_version(self.package, self.package)

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Needs the package, a device and dtype of its kernel, and a mask that has slices."""
        missing = import_refusal(self.package, (API, "magi_attention.common"), INSTALL)
        if missing or case.unfit:
            return missing or case.unfit
        if case.seq_len < world:
            return f"{case.seq_len} tokens are less than {world} chunks"
        return slices_refusal(case.mask()) or _kernel_refusal(shape)

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """See `Contender.prepare`."""
        del rank, world
        api = importlib.import_module(API)
        ranges = importlib.import_module("magi_attention.common").AttnRanges.from_ranges
        slices = attention_slices(case.mask())
        key = api.magi_attn_flex_key(
            q_ranges=ranges([[a, b] for a, b, *_ in slices]),
            k_ranges=ranges([[c, d] for _, _, c, d, _ in slices]),
            attn_mask_type=[kind for *_, kind in slices],
            total_seqlen_q=case.seq_len,
            total_seqlen_k=case.seq_len,
            num_heads_q=shape.q_heads,
            num_heads_kv=shape.kv_heads,
            head_dim=shape.head_dim,
            pad_size=0,
            cp_group_or_mesh=dist.group.WORLD,
        )
        tokens = torch.arange(case.seq_len, device=shape.device)
        positions = api.dispatch(tokens, key, pad_value=-1).long().cpu().numpy()
        whole = shape.inputs(case.seq_len)
        q, k, v, dout = (api.dispatch(x[0].contiguous(), key)[None] for x in whole)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out, _ = api.calc_attn(q[0], k[0], v[0], key)
            return out[None]

        note = f"{len(slices)} attention slices"
        return prepare_autograd(positions, attend, (q, k, v, dout), note)


def _kernel_refusal(shape: Shape) -> str | None:
    """Why its kernel cannot run such inputs here, found by a call of `ROWS` tokens."""

    def call() -> None:
        function = importlib.import_module(API).flex_flash_attn_func
        q, k, v, _ = (x[0].requires_grad_() for x in shape.inputs(ROWS))
        whole = torch.tensor([[0, ROWS]], dtype=torch.int32, device=shape.device)
        kind = torch.zeros(1, dtype=torch.int32, device=shape.device)
        out, _ = function(q, k, v, q_ranges=whole, k_ranges=whole, attn_type_map=kind)
        torch.autograd.grad(out.sum(), (q, k, v))

    return call_refusal(f"its kernel on {shape.device} in {shape.dtype}", call)

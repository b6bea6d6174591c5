"""One case of `ringattn.benchmarks.long_step`, in its own process."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ringattn as ra
from ringattn.launch.config import Config
from ringattn.launch.config_load import config_from_values
from ringattn.launch.engine import Engine, open_engine
from ringattn.launch.feed import PlanAttend
from ringattn.launch.flops import flops_per_step
from ringattn.launch.job import build_context
from ringattn.launch.layers import Attend, LMHead
from ringattn.launch.metrics import peak_flops
from ringattn.launch.model_config import MODEL_SIZES, ModelConfig, model_config
from ringattn.launch.packing import IGNORE
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import open_session
from ringattn.launch.weights import weight_source
from ringattn.parallel.mesh import build_mesh

OUT_OF_MEMORY = 42
STEPS = 2  # the first one warms up


@dataclass(frozen=True)
class PlainAttend:
    """PyTorch's own causal attention of a whole sequence."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, T, H, D) as ours."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)


def plain_loss(
    head: LMHead, hidden_BTC: torch.Tensor, labels_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy over logits of all tokens, as most training scripts compute it."""
    logits = F.linear(hidden_BTC, head.weight)
    if labels_BT is None:
        return logits
    wide = logits.flatten(0, -2).float()
    return F.cross_entropy(wide, labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def run_case(
    *, part: str, model: str, tokens: int, layers: int | None, window: int | None, plain: bool
) -> int:
    """Runs the steps and prints one line of JSON; returns the exit status."""
    shape = model_config(model, vocab_size=MODEL_SIZES[model].vocab_size, layers=layers)
    config = settings(tokens, plain, keep_most=part != "longest")
    swapped: AbstractContextManager[object] = nullcontext()
    if plain:
        swapped = mock.patch.object(LMHead, "forward", plain_loss)
    try:
        with open_session(config, Ranks(), dist.HashStore()) as session, swapped:
            found = measure(config, shape, session.device, tokens, window, plain)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    print(json.dumps(found))
    return 0


def settings(tokens: int, plain: bool, keep_most: bool) -> Config:
    """What a run of one GPU at such a length would set.

    Attention outputs are kept where time counts; where length does, layer inputs alone are, in host
    memory, of which a GPU's share of 128 GiB bounds the length.
    """
    values: dict[str, object] = {
        "data.seq_len": tokens,
        "parallel.engine": "fsdp",
        "train.dtype": "bf16",
        "memory.checkpointing": "attention" if keep_most and not plain else "full",
    }
    if not plain:
        tile = min(16_384, max(1, tokens // 4))
        values |= {"memory.offload": not keep_most, "memory.token_tile": tile}
    return config_from_values(values)


def measure(
    config: Config,
    shape: ModelConfig,
    device: torch.device,
    tokens: int,
    window: int | None,
    plain: bool,
) -> dict[str, object]:
    """Seconds of the last step, memory and rates."""
    mesh = build_mesh(device.type, dp=1, cp=1, timeout=timedelta(seconds=config.run.timeout_s))
    engine = open_engine(config, shape, device, mesh, weight_source(config, shape))
    mask = ra.masks.documents([tokens], causal=True, window=window)
    attend: Attend = PlainAttend()
    if not plain:
        attend = PlanAttend(build_context(config, shape, mesh.cp_mesh).plan(mask))
    host = 0
    seconds = 0.0
    for _ in range(STEPS):
        seconds = one_step(engine, shape, device, tokens, attend)
    on_gpu = device.type == "cuda"
    if on_gpu:
        host = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    flops = flops_per_step(shape, tokens, mask.area)
    peak = peak_flops(device)
    engine.close()
    return {
        "step_s": seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "host_bytes": host,
        "memory": {
            "checkpointing": config.memory.checkpointing,
            "offload": config.memory.offload,
            "token_tile": config.memory.token_tile,
        },
    }


def one_step(
    engine: Engine, shape: ModelConfig, device: torch.device, tokens: int, attend: Attend
) -> float:
    """A whole step on random tokens; its seconds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab_size, (1, tokens + 1), generator=generator).to(device)
    positions = torch.arange(tokens, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    loss = engine.loss_sum(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, attend)
    engine.backward(loss / tokens, last=True)
    norm = engine.step(1e-4)
    value = float(norm) + float(loss.detach())  # waits for the device
    if value != value:
        raise FloatingPointError("the loss is not a number")
    return time.perf_counter() - began

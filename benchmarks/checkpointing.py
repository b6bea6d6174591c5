"""A training step under each way to save activation memory: CPU time and traced peak bytes.

    python -m ringattn.benchmarks.checkpointing [--out FILE] [--tokens N] [--dim C] [--layers L]

One process, one sequence, causal, float32, on the CPU (on the GPU where there is one: CUDA events
and allocator peaks, bfloat16). Ways take turns within one run, so that their ratios to keeping
everything (`none`) hold on a busy machine too. Time is of the CPU, all threads, of forward and
backward; memory is the peak of what a step allocates beyond the parameters, gradients included. On
the CPU `offload` moves nothing away: host memory is what is traced.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.benchmarks.linear_loss import peak_bytes, seconds
from ringattn.benchmarks.record import Recorder
from ringattn.launch.config_load import config_from_values
from ringattn.launch.feed import PlanAttend
from ringattn.launch.layer_memory import apply_memory
from ringattn.launch.model import Transformer, init_weights
from ringattn.launch.model_config import ModelConfig
from ringattn.selective import cheap_part

NAME = "checkpointing"
SHARE = 0.25


def ways(tile: int) -> dict[str, dict[str, Any]]:
    """Settings by name."""
    modes = ("none", "full", "attention", "sequence")
    found: dict[str, dict[str, Any]] = {m: {"memory.checkpointing": m} for m in modes}
    for mode in modes:
        found[f"{mode}-tile"] = found[mode] | {"memory.token_tile": tile}
    for mode in ("full", "attention"):
        found[f"{mode}-tile-offload"] = found[f"{mode}-tile"] | {"memory.offload": True}
    for mode in ("none", "attention"):
        found[f"{mode}-compile"] = found[mode] | {"train.compile": True}
    return found


def make_step(
    shape: ModelConfig, settings: dict[str, Any], plan: ra.Plan, device: str
) -> Callable[[], None]:
    """Forward and backward of a model with these settings."""
    model = Transformer(shape)
    init_weights(model, 0)
    model.to(device)
    apply_memory(model, config_from_values({**settings, "memory.recompute": SHARE}))
    tokens = (torch.arange(plan.mask.seq_len, device=device) * 7919 % shape.vocab_size)[None]
    positions = plan.positions()

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(tokens, positions, PlanAttend(plan), labels_BT=tokens.roll(-1))
        loss.backward()

    return step


def measure(
    recorder: Recorder, shape: ModelConfig, tokens: int, tile: int, repeats: int, device: str
) -> None:
    """Times and peaks of all ways, a line and two records each."""
    heads = (shape.heads, shape.kv_heads)
    context = ra.ContextParallel(None, heads=heads, head_dim=shape.head_dim)
    plan = context.plan(ra.masks.causal(tokens))
    cheap_part(plan, SHARE)
    config = {
        "tokens": tokens, "dim": shape.dim, "layers": shape.layers, "heads": list(heads),
        "head_dim": shape.head_dim, "ffn_dim": shape.ffn_dim, "tile": tile, "recompute": SHARE,
        "device": device, "repeats": repeats,
    }  # fmt: skip
    steps = {name: make_step(shape, s, plan, device) for name, s in ways(tile).items()}
    peaks: dict[str, int] = {}
    for name, step in steps.items():
        step()  # compiles, and makes what is made once
        peaks[name] = peak_bytes(step, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    for name in steps:
        ratios = np.divide(times[name], times["none"])
        spread = float(np.subtract(*np.percentile(ratios, [75, 25])) / 2)
        ratio, case = float(np.median(ratios)), f"causal-{tokens}-{name}"
        full = config | {"seconds": float(np.median(times[name]))}
        recorder.ok(NAME, f"{case}-time", ratio, "ratio", spread=spread, config=full)
        part = peaks[name] / peaks["none"]
        recorder.ok(NAME, f"{case}-peak", part, "ratio", config=config | {"bytes": peaks[name]})
        print(f"{case:40} time {ratio:5.2f} ± {spread:.2f}  peak {part:5.2f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", default="benchmarks/results/checkpointing.jsonl")
    parser.add_argument("--tokens", type=int, default=131072 if cuda else 8192)
    parser.add_argument("--dim", type=int, default=2048 if cuda else 128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tile", type=int, default=8192 if cuda else 1024)
    parser.add_argument("--repeats", type=int, default=5 if cuda else 3)
    args = parser.parse_args()
    head_dim = 128 if cuda else 32
    shape = ModelConfig(
        vocab_size=1024, dim=args.dim, layers=args.layers, heads=args.dim // head_dim,
        kv_heads=max(1, args.dim // head_dim // 4), head_dim=head_dim, ffn_dim=4 * args.dim,
    )  # fmt: skip
    device = "cuda" if cuda else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
        measure(Recorder(args.out), shape, args.tokens, args.tile, args.repeats, device)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

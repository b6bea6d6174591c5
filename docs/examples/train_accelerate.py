"""Trains a `transformers` model under `accelerate`, dp × cp ranks.

    torchrun --nproc-per-node 2 docs/examples/train_accelerate.py README.md
    torchrun --nproc-per-node 4 docs/examples/train_accelerate.py README.md --cp 2

What accelerate does here: device, mixed precision, gradient averaging over all ranks (DDP),
clipping, the optimizer's step. What it must not do: its own context parallelism (it knows only
PyTorch's, which takes SDPA with a causal mask, and has no place for another), so no
`parallelism_config` is given and the mesh is made here; and the data loader, which would give each
rank other samples, where the ranks of a cp group need the same ones.

`transformers.Trainer` is not used. As it is, it gives every rank other samples and calls the model
without plans, so that an attached model stops at its first layer, in one line. A subclass would
have to replace its data loader, its batch preparation and the scale of its loss.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from ringattn import hf


def main() -> None:
    """Trains for a few steps and prints the loss of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="file to learn, byte by byte")
    parser.add_argument("--cp", type=int, help="ranks that share a sequence (default: all)")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    world = accelerator.num_processes
    cp = args.cp or world
    mesh = init_device_mesh(accelerator.device.type, (world // cp, cp), mesh_dim_names=("dp", "cp"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    parallel = hf.attach(model, mesh["cp"])  # before prepare, which wraps the model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    causal_loss, optimizer = accelerator.prepare(hf.CausalLoss(model), optimizer)

    tokens = torch.tensor(list(args.text.read_bytes()), device=accelerator.device)
    counted = (world // cp) * (args.seq_len - 1)  # of the step: all dp groups
    for step in range(args.steps):
        number = step * (world // cp) + mesh.get_local_rank("dp")
        start = number * args.seq_len % max(len(tokens) - args.seq_len, 1)
        whole = tokens[None, start : start + args.seq_len]  # the same in the whole cp group
        batch = parallel.shard(whole, labels=whole, num_items_in_batch=counted)
        loss = causal_loss(**batch)
        # DDP takes the mean over all ranks, and the gradient is a sum.
        accelerator.backward(loss * world)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = accelerator.reduce(loss.detach(), reduction="sum")
        accelerator.print(f"step {step + 1}  loss {float(total):.4f}", flush=True)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # once nothing holds a group of its own

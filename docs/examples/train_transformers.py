"""Trains a `transformers` model with every sequence spread over all ranks.

    torchrun --nproc-per-node 2 docs/examples/train_transformers.py README.md
    torchrun --nproc-per-node 8 docs/examples/train_transformers.py text.txt --model FOLDER

Without --model a tiny Llama with random weights learns the file's bytes. A rank never holds
another rank's tokens; losses and gradients are sums over ranks, never means.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ringattn import hf


def main() -> None:
    """Trains for a few steps and prints the loss of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="file to learn")
    parser.add_argument("--model", help="folder of a checkpoint with its tokenizer")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)  # the same weights on every rank
    text = args.text.read_text(encoding="utf-8")
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        tokens = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt").input_ids[0]
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2,
            )
        )  # fmt: skip
        tokens = torch.tensor(list(text.encode()))

    parallel = hf.attach(model.to(device).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        start = step * args.seq_len % max(len(tokens) - args.seq_len, 1)
        whole = tokens[None, start : start + args.seq_len].to(device)  # the same on every rank
        batch = parallel.shard(whole, labels=whole)
        loss = hf.loss(model, batch)
        loss.backward()
        parallel.sum_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = parallel.sum(loss)
        if dist.get_rank() == 0:
            print(f"step {step + 1}  loss {float(total):.4f}", flush=True)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # once nothing holds a group of its own

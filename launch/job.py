"""Everything a run needs that can be known before any rank starts: corpus, model, checkpoint."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import ringattn as ra
from ringattn.errors import UserError
from ringattn.kernels import choose_kernel, kernel_names
from ringattn.launch.checkpoint import (
    CheckpointState,
    check_identity,
    choose_checkpoint,
    read_state,
)
from ringattn.launch.config import Config
from ringattn.launch.config_check import check_config, check_engine, resolve_model
from ringattn.launch.corpus import CorpusMeta, load_meta
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.packing import PackedDataset
from ringattn.launch.prepare import prepare_if_missing
from ringattn.launch.session import place_ranks
from ringattn.methods import METHODS

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked run.

    Attributes:
        config: its configuration.
        shape: the model.
        train, heldout: the corpus's splits; heldout is None where the corpus holds nothing out.
        identity: what a checkpoint must share to be continued, by dotted key.
        checkpoint: where to continue from, and what it says of itself; None to start anew.
    """

    config: Config
    shape: ModelConfig
    train: PackedDataset
    heldout: PackedDataset | None
    identity: dict[str, Any]
    checkpoint: tuple[Path, CheckpointState] | None


def open_job(config: Config, local_world: int) -> Job:
    """Checks the whole configuration against corpus, model and checkpoint. Writes nothing.

    Args:
        config: the run.
        local_world: ranks that run on this host.

    Raises:
        UserError: naming key, value, rule and fix.
    """
    check_config(config)
    placement = place_ranks(config, local_world)
    check_engine(config, shared_gpu=placement.shared)
    meta = load_meta(config.data.path)
    shape = resolve_model(config, meta.vocab_size)
    path, seq_len, longest = config.data.path, config.data.seq_len, config.data.max_document
    train = PackedDataset(path, "train", seq_len, config.seed, max_document=longest)
    check_attention(config, shape, placement.device_type, train.pack(0).lengths)
    heldout = None
    if meta.tokens("heldout"):
        heldout = PackedDataset(path, "heldout", seq_len, max_document=longest)
    identity = run_identity(config, shape, meta)
    found = choose_checkpoint(config.checkpoint.resume, config.run.dir)
    checkpoint = None
    if found is not None:
        state = read_state(found)
        check_identity(found, state, identity)
        if state.step > config.train.steps:
            raise UserError(
                f"train.steps={config.train.steps}",
                f"checkpoint {found} is already at step {state.step}",
                f"raise train.steps to at least {state.step}, or resume from an older one",
            )
        checkpoint = (found, state)
    return Job(
        config=config,
        shape=shape,
        train=train,
        heldout=heldout,
        identity=identity,
        checkpoint=checkpoint,
    )


def build_context(
    config: Config, shape: ModelConfig, group: DeviceMesh | int, staged: str | None = None
) -> ra.ContextParallel:
    """The attention of a group of ranks, or of a number of simulated ones. No communication.

    `staged` is as in `ContextParallel`.
    """
    attention = config.attention
    wire = attention.wire_dtype
    options = {"u": attention.u, "stages": attention.stages, "save": int(attention.save) or None}
    return ra.ContextParallel(
        group,
        heads=(shape.heads, shape.kv_heads),
        head_dim=shape.head_dim,
        dtype=COMPUTE_DTYPES[config.train.dtype],
        method=attention.method,
        layout=attention.layout,
        kernel=attention.kernel,
        wire_dtype=COMPUTE_DTYPES.get(wire, wire) if wire else None,
        cluster=attention.cluster,
        options={name: value for name, value in options.items() if value is not None},
        refine=attention.refine or None,
        timeout=timedelta(seconds=config.run.timeout_s),
        staged=staged,
    )


def check_attention(
    config: Config, shape: ModelConfig, device_type: str, lengths: list[int]
) -> None:
    """Checks the names under ``attention`` and plans one pack for simulated ranks.

    Raises:
        UserError: an unknown name, a kernel that refuses such inputs on the device, or a
            combination that no plan can be made for.
    """
    attention = config.attention
    known = {
        "method": (attention.method, ("auto", *METHODS)),
        "layout": (attention.layout, ("auto", *ra.layouts.NAMES)),
        "kernel": (attention.kernel, ("auto", *kernel_names())),
    }
    for key, (name, names) in known.items():
        if name not in names:
            raise UserError(
                f"attention.{key}={name}", f"must be one of {', '.join(names)}", "pick one of them"
            )
    try:
        choose_kernel(
            attention.kernel,
            device=device_type,
            dtype=COMPUTE_DTYPES[config.train.dtype],
            head_dim=(shape.head_dim, shape.head_dim),
        )
        context = build_context(config, shape, config.parallel.cp)
        context.plan(ra.masks.documents(lengths, causal=True))
    except UserError as error:
        raise UserError(f"attention: {error.what}", error.rule, error.fix) from None


def run_identity(config: Config, shape: ModelConfig, meta: CorpusMeta) -> dict[str, Any]:
    """Dotted keys and JSON values that decide which weights and data a checkpoint is about."""
    shards = [(shard.name, shard.tokens, shard.bin_crc32) for shard in meta.shards]
    digest = hashlib.sha256(json.dumps([meta.vocab_size, meta.eos_id, shards]).encode())
    model = {f"model.{key}": value for key, value in asdict(shape).items() if key != "max_seq_len"}
    return {
        "seed": config.seed,
        "data.seq_len": config.data.seq_len,
        "data.max_document": config.data.max_document,
        "data.path": f"corpus {digest.hexdigest()[:12]}",
        **model,
    }


def prepare_corpus(config: Config) -> None:
    """Prepares ``data.path`` from ``data.source`` when it does not exist; says so on stderr.

    Raises:
        UserError: the source cannot be read.
    """
    data = config.data
    if data.source is None or (Path(data.path) / "meta.json").is_file():
        return
    print(f"preparing {data.path} from {data.source}", file=sys.stderr, flush=True)
    meta, _ = prepare_if_missing(data.source, data.path, tokenizer=data.tokenizer)
    print(
        f"prepared {data.path}: {meta.documents('train'):,} documents, "
        f"{meta.tokens('train'):,} tokens, {meta.tokens('heldout'):,} held out",
        file=sys.stderr,
        flush=True,
    )

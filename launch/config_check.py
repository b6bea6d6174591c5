"""Refuses configurations that cannot run, before any process starts."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ringattn.errors import UserError
from ringattn.launch.config import Config, ModelSection
from ringattn.launch.config_load import config_values
from ringattn.launch.data_check import check_data
from ringattn.launch.hf_config import read_hf_config
from ringattn.launch.model_config import ModelConfig, model_config
from ringattn.launch.rope_config import resolve_rope
from ringattn.parallel.zero import require_deepspeed

_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "data.seq_len": 2,
    "data.max_document": 2,
    "data.long_document": 1,
    "data.long_repeats": 1,
    "parallel.cp": 1,
    "parallel.dp": 1,
    "parallel.zero_stage": 1,
    "parallel.min_cp": 1,
    "memory.recompute": 0,
    "memory.token_tile": 1,
    "model.window": 1,
    "model.full_every": 0,
    "train.steps": 1,
    "train.accumulate": 1,
    "train.min_lr": 0,
    "train.warmup_steps": 0,
    "train.weight_decay": 0,
    "train.clip_norm": 0,
    "train.threads_per_rank": 1,
    "train.eval_every": 0,
    "train.eval_packs": 1,
    "train.log_every": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "checkpoint.keep_every": 0,
    "parallel.ranks_per_node": 1,
    "faults.spike_factor": 1,
    "faults.spike_window": 2,
    "faults.max_in_a_row": 1,
    "faults.straggler_factor": 0,
    "faults.straggler_steps": 1,
}
_MORE_THAN_ZERO = ("run.timeout_s", "train.lr")
_LARGEST = 2.0**62


def check_config(config: Config) -> None:
    """Checks every value and combination that needs neither files of the corpus nor ranks.

    Raises:
        UserError: naming key, value, rule and fix.
    """
    values = config_values(config)
    for key, least in _AT_LEAST.items():
        value = values[key]
        # Written so that NaN fails.
        if value is not None and not least <= value <= _LARGEST:
            raise UserError(f"{key}={value}", f"must be at least {least:g}", f"set {key}={least:g}")
    for key in _MORE_THAN_ZERO:
        if not 0 < values[key] <= _LARGEST:
            raise UserError(
                f"{key}={values[key]}",
                "must be positive and finite",
                "set it above 0",
            )
    _check_nodes(config)
    _check_schedule(config)
    _check_profile(config)
    check_engine(config, shared_gpu=config.run.device == "cuda_shared")
    _check_run_dir(config.run.dir)
    check_data(config)
    _check_memory(config)
    _check_degrees(config)
    _check_faults(config)
    resolve_model(config, vocab_size=1)


def resolve_model(config: Config, vocab_size: int) -> ModelConfig:
    """The model's shape: the named size or the checkpoint's, and what the config overrides.

    `vocab_size` is the corpus's: a named size takes it, a checkpoint must have as many tokens.

    Raises:
        UserError: an unknown size or an impossible shape.
    """
    section = config.model
    if section.hf is not None:
        shape = _hf_shape(section, vocab_size)
    else:
        shape = _named_shape(section, vocab_size)
    return replace(shape, rope_scaling=resolve_rope(section, shape.rope_scaling))


def _named_shape(section: ModelSection, vocab_size: int) -> ModelConfig:
    return model_config(
        section.size,
        vocab_size=vocab_size,
        layers=section.layers,
        dim=section.dim,
        heads=section.heads,
        kv_heads=section.kv_heads,
        head_dim=section.head_dim,
        ffn_dim=section.ffn_dim,
        rope_theta=section.rope_theta,
        tie_embeddings=section.tie_embeddings,
        window=section.window,
        full_every=section.full_every,
        max_seq_len=None,
    )


def _hf_shape(section: ModelSection, vocab_size: int) -> ModelConfig:
    """The checkpoint's shape; only what changes no weight may be overridden."""
    for key in ("layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim", "tie_embeddings"):
        value = getattr(section, key)
        if value is not None:
            raise UserError(
                f"model.{key}={value}", "is given by the checkpoint in model.hf", "leave it null"
            )
    shape = read_hf_config(str(section.hf))
    if vocab_size > shape.vocab_size:
        raise UserError(
            f"model.hf={section.hf}",
            f"has {shape.vocab_size} tokens, the corpus {vocab_size}",
            "prepare the corpus with the checkpoint's tokenizer (data.tokenizer)",
        )
    given = {key: getattr(section, key) for key in ("rope_theta", "window", "full_every")}
    return replace(shape, **{key: value for key, value in given.items() if value is not None})


def check_engine(config: Config, *, shared_gpu: bool) -> None:
    """Checks ``parallel.engine`` against offloading, the ZeRO stage and the device.

    Args:
        config: the run.
        shared_gpu: ranks share a GPU, so that gloo carries their messages.

    Raises:
        UserError: an impossible combination, or DeepSpeed is not installed.
    """
    parallel = config.parallel
    engine, offload, stage = parallel.engine, parallel.offload, parallel.zero_stage
    if stage > 3:
        raise UserError(
            f"parallel.zero_stage={stage}", "must be 1, 2 or 3", "set parallel.zero_stage=3"
        )
    what = f"parallel.offload={offload}"
    if engine == "ddp" and offload != "none":
        raise UserError(
            what,
            "needs a sharded engine",
            "set parallel.engine=deepspeed, or parallel.offload=none",
        )
    if engine == "fsdp" and offload == "optimizer":
        raise UserError(
            what,
            "parallel.engine=fsdp keeps an optimizer where its parameters are",
            "set parallel.offload=parameters, or parallel.engine=deepspeed",
        )
    if engine == "deepspeed" and offload == "parameters" and stage != 3:
        raise UserError(
            what,
            f"needs sharded parameters, not parallel.zero_stage={stage}",
            "set parallel.zero_stage=3, or parallel.offload=optimizer",
        )
    if engine != "ddp" and shared_gpu:
        raise UserError(
            f"parallel.engine={engine}",
            "needs a GPU for each rank: gloo does not shard tensors of a GPU",
            "set parallel.engine=ddp or run.device=cpu",
        )
    if engine == "deepspeed":
        require_deepspeed()


def _check_nodes(config: Config) -> None:
    """A node of more ranks than there are is a mistake; an elastic job may have grown smaller."""
    per_node, parallel = config.parallel.ranks_per_node, config.parallel
    if per_node is not None and per_node > config.world and not parallel.elastic:
        raise UserError(
            f"parallel.ranks_per_node={per_node}",
            f"must be at most the dp × cp = {parallel.dp} × {parallel.cp} ranks of the run",
            "leave it null, which asks the launcher, or raise parallel.dp or parallel.cp",
        )


def _check_faults(config: Config) -> None:
    """Rolling back needs checkpoints to go back to."""
    faults = config.faults
    for key, policy in (("on_nonfinite", faults.on_nonfinite), ("on_spike", faults.on_spike)):
        if policy == "rollback" and config.checkpoint.every == 0:
            raise UserError(
                f"faults.{key}=rollback",
                "needs checkpoints to go back to, and checkpoint.every=0 saves at the end alone",
                "set e.g. checkpoint.every=100",
            )


def _check_degrees(config: Config) -> None:
    """Packs may run on fewer ranks where those divide cp and where a cluster predicts times."""
    cp, least = config.parallel.cp, config.parallel.min_cp
    if least is None:
        return
    if cp % least:
        raise UserError(
            f"parallel.min_cp={least}",
            f"must divide parallel.cp={cp}",
            f"set parallel.min_cp to a divisor of {cp}, or null",
        )
    if config.attention.cluster is None:
        raise UserError(
            f"parallel.min_cp={least}",
            "needs attention.cluster, on which times are predicted",
            "set e.g. attention.cluster=h100_sxm, or parallel.min_cp=null",
        )


def _check_schedule(config: Config) -> None:
    train = config.train
    if train.min_lr > train.lr:
        raise UserError(
            f"train.min_lr={train.min_lr}",
            f"must not exceed train.lr={train.lr}",
            f"set train.min_lr to at most {train.lr}",
        )
    if not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(
            f"train.betas={list(train.betas)}", "each must be in [0, 1)", "set e.g. [0.9, 0.95]"
        )


def _check_profile(config: Config) -> None:
    text, steps = config.train.profile, config.train.steps
    try:
        span = config.train.profile_steps
    except ValueError:
        span = range(0)
    if text is not None and not (0 <= span.start < span.stop <= steps):
        raise UserError(
            f"train.profile={text}",
            f"must be START:STOP with 0 <= START < STOP <= train.steps={steps}",
            f"set e.g. train.profile={max(steps - 2, 0)}:{steps}",
        )


def _check_memory(config: Config) -> None:
    memory = config.memory
    if not memory.recompute <= 1:
        raise UserError(
            f"memory.recompute={memory.recompute}",
            "is a share of the attention forward, at most 1",
            "set e.g. memory.recompute=0.25",
        )
    if memory.offload and memory.checkpointing == "none":
        raise UserError(
            "memory.offload=true",
            "moves what checkpointing keeps, and memory.checkpointing=none has no checkpoints",
            "set memory.checkpointing=full, attention or sequence",
        )
    if config.attention.save and memory.checkpointing == "sequence":
        raise UserError(
            "attention.save=true",
            "keeps q, k and v of every head, more than memory.checkpointing=sequence can gain",
            "set attention.save=false, or memory.checkpointing=attention",
        )
    if config.train.compile and _runs_on_cpu(config) and not _has_cpp_compiler():
        raise UserError(
            "train.compile=true",
            "needs a C++ compiler to compile for the CPU, and none is found",
            "install g++ or name one in CXX, or set train.compile=false",
        )


def _runs_on_cpu(config: Config) -> bool:
    device = config.run.device
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _has_cpp_compiler() -> bool:
    """Whether one of the compilers that torch would try is on the path."""
    from torch._inductor import config as inductor  # slow to import

    names = inductor.cpp.cxx
    names = names if isinstance(names, list | tuple) else (names,)
    return any(name is not None and shutil.which(name) for name in names)


def _check_run_dir(text: str) -> None:
    """The run folder must be a writable folder, or be creatable; nothing is created here."""
    if not text.strip():
        raise UserError("run.dir=''", "must name a folder", "set e.g. run.dir=runs/first")
    path = Path(text).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir():
        raise UserError(
            f"run.dir={text}", f"{existing} is a file, not a folder", "name another folder"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"run.dir={text}", f"{existing} cannot be written", "name a writable folder"
        )

"""Everything a run needs that can be known before any rank starts: corpus, model, checkpoint."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import ringattn as ra
from ringattn.errors import UserError
from ringattn.kernels import choose_kernel, kernel_names
from ringattn.launch.checkpoint_choice import Candidate, Choice, choose_checkpoints
from ringattn.launch.config import AttentionConfig, Config
from ringattn.launch.config_check import check_config, check_engine, resolve_model
from ringattn.launch.corpus import CorpusMeta, load_meta
from ringattn.launch.degrees import degrees_of
from ringattn.launch.feed import layer_masks
from ringattn.launch.hf_weights import HFWeights
from ringattn.launch.initial_weights import WeightsChoice, choose_weights
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.packing import PackedDataset
from ringattn.launch.prepare import prepare_if_missing
from ringattn.launch.session import place_ranks
from ringattn.methods import METHODS
from ringattn.parallel.topology import Topology, even_nodes

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked run.

    Attributes:
        config: its configuration.
        shape: the model.
        train, heldout: the corpus's splits; heldout is None where the corpus holds nothing out.
        identity: what a checkpoint must share to be continued, by dotted key.
        choice: where it may continue from; without a candidate it starts anew.
        weights: checkpoints that a run that starts anew may take its weights from, or None.
    """

    config: Config
    shape: ModelConfig
    train: PackedDataset
    heldout: PackedDataset | None
    identity: dict[str, Any]
    choice: Choice
    weights: WeightsChoice | None = None

    @property
    def checkpoint(self) -> Candidate | None:
        """The first candidate, whose files are not verified yet; None to start anew."""
        return next(iter(self.choice.candidates), None)


def open_job(config: Config, local_world: int) -> Job:
    """Checks the whole configuration against corpus, model and checkpoint. Writes nothing.

    Args:
        config: the run.
        local_world: ranks that share the GPUs of this host.

    Raises:
        UserError: naming key, value, rule and fix.
    """
    check_config(config)
    placement = place_ranks(config, local_world)
    check_engine(config, shared_gpu=placement.shared)
    metas = [load_meta(folder) for folder, _ in config.data.corpora]
    shape = resolve_model(config, metas[0].vocab_size)
    train = open_split(config, "train")
    lengths = train.read(0, config.data.longest).lengths
    check_attention(config, shape, placement.device_type, lengths)
    heldout = None
    if any(meta.tokens("heldout") for meta in metas):
        heldout = open_split(config, "heldout")
    identity = run_identity(config, shape, metas)
    if config.model.hf is not None:
        identity["model.hf"] = f"weights {HFWeights(config.model.hf, shape).digest()[:12]}"
    identity = json.loads(json.dumps(identity))
    choice = choose_checkpoints(config.checkpoint.resume, config.run.dir, identity)
    if choice.candidates:
        found, state = choice.candidates[0]
        if state.step > config.train.steps:
            raise UserError(
                f"train.steps={config.train.steps}",
                f"checkpoint {found} is already at step {state.step}",
                f"raise train.steps to at least {state.step}, or resume from an older one",
            )
    weights = None
    if config.checkpoint.weights is not None and not choice.candidates:
        weights = choose_weights(config.checkpoint.weights, shape)
    return Job(
        config=config,
        shape=shape,
        train=train,
        heldout=heldout,
        identity=identity,
        choice=choice,
        weights=weights,
    )


def open_split(config: Config, split: str) -> PackedDataset:
    """One split of the run's corpora, in sequences of ``data.seq_len``.

    Raises:
        UserError: bad files, an empty split, or corpora of different tokenizers.
    """
    data = config.data
    return PackedDataset(
        data.corpora,
        split,
        data.seq_len,
        config.seed,
        max_document=data.max_document,
        long_document=data.long_document,
        long_repeats=data.long_repeats,
    )


def build_context(
    config: Config,
    shape: ModelConfig,
    group: DeviceMesh | dist.ProcessGroup | int,
    staged: str | None = None,
    topology: Topology | None = None,
) -> ra.ContextParallel:
    """The attention of a group of ranks, or of a number of simulated ones. No communication.

    `staged` is as in `ContextParallel`. Ranks per node come from ``parallel.ranks_per_node``, else
    from `topology`, else from the cluster or the launcher's variables.
    """
    per_node = config.parallel.ranks_per_node
    if per_node is not None:
        topology = even_nodes(config.world, per_node)
    size = group if isinstance(group, int) else group.size()
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
        ranks_per_node=topology and topology.ranks_per_node(size),
        timeout=timedelta(seconds=config.run.timeout_s),
        staged=staged,
    )


def build_degree(
    config: Config,
    shape: ModelConfig,
    degree: int,
    group: dist.ProcessGroup | None = None,
    staged: str | None = None,
    topology: Topology | None = None,
) -> ra.ContextParallel:
    """As `build_context`, for a group of `degree` ranks, simulated ones unless it is given.

    A rank that leaves its cp group has nothing to choose: alone, all methods are the same work.
    """
    if degree == 1 and config.parallel.cp > 1:
        alone = AttentionConfig(
            method="ring",
            layout="contiguous",
            kernel=config.attention.kernel,
            cluster=config.attention.cluster,
        )
        config = replace(config, attention=alone)
    return build_context(config, shape, group or degree, staged, topology)


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
    except UserError as error:
        raise UserError(f"attention: {error.what}", error.rule, error.fix) from None
    for degree in degrees_of(config.parallel.cp, config.parallel.min_cp):
        try:
            build_degree(config, shape, degree).plans(layer_masks(lengths, shape.windows))
        except UserError as error:
            where = "" if degree == config.parallel.cp else f" on {degree} ranks (parallel.min_cp)"
            raise UserError(f"attention{where}: {error.what}", error.rule, error.fix) from None


def run_identity(config: Config, shape: ModelConfig, metas: list[CorpusMeta]) -> dict[str, Any]:
    """Dotted keys and JSON values that decide which weights and data a checkpoint is about.

    A curriculum is none of them, like the learning rate: the position in the data is counted in
    tokens, so that another one goes on where the checkpoint stopped.
    """
    weights = [weight for _, weight in config.data.corpora]
    model = {f"model.{key}": value for key, value in asdict(shape).items() if key != "max_seq_len"}
    return {
        "seed": config.seed,
        "data.seq_len": config.data.seq_len,
        "data.max_document": config.data.max_document,
        "data.long_document": config.data.long_document,
        "data.long_repeats": config.data.long_repeats,
        "data.path": corpus_name(metas[0]),
        "data.mixture": [
            [corpus_name(meta), weight / sum(weights)]
            for meta, weight in zip(metas, weights, strict=True)
        ],
        **model,
    }


def corpus_name(meta: CorpusMeta) -> str:
    """A name that equal corpora share, wherever they lie."""
    shards = [(shard.name, shard.tokens, shard.bin_crc32) for shard in meta.shards]
    digest = hashlib.sha256(json.dumps([meta.vocab_size, meta.eos_id, shards]).encode())
    return f"corpus {digest.hexdigest()[:12]}"


def prepare_corpus(config: Config) -> None:
    """Prepares ``data.path`` from ``data.source`` when it is read and missing; says so on stderr.

    Raises:
        UserError: the source cannot be read.
    """
    data = config.data
    read = data.path in (folder for folder, _ in data.corpora)
    if data.source is None or not read or (Path(data.path) / "meta.json").is_file():
        return
    print(f"preparing {data.path} from {data.source}", file=sys.stderr, flush=True)
    meta, _ = prepare_if_missing(data.source, data.path, tokenizer=data.tokenizer)
    print(
        f"prepared {data.path}: {meta.documents('train'):,} documents, "
        f"{meta.tokens('train'):,} tokens, {meta.tokens('heldout'):,} held out",
        file=sys.stderr,
        flush=True,
    )

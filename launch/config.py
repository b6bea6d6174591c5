"""The configuration of a training run: frozen dataclasses, one per section of the YAML file.

`ringattn.launch.config_load` reads and writes them, `ringattn.launch.config_check` refuses
impossible combinations. Every key is reachable as ``section.key=value`` on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, what it runs on and how long it waits for a rank.

    Attributes:
        dir: run folder; everything the run writes lies below it.
        name: title of the loss curve; "" takes the folder's name.
        device: "cuda" gives each rank a GPU of its own; "cuda_shared" lets the ranks of a host
            share its GPUs, with messages staged through host memory: slow, for tests; "auto" takes
            the first of "cuda", "cuda_shared" and "cpu" that the host can run.
        timeout_s: seconds a collective waits for another rank before the run fails.
        interface: network interface that ranks of several hosts talk over, such as eth0 or ib0;
            null takes the one that leads to MASTER_ADDR.
    """

    dir: str = "runs/default"
    name: str = ""
    device: Literal["auto", "cpu", "cuda", "cuda_shared"] = "auto"
    timeout_s: float = 600.0
    interface: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared corpus and how it is cut into sequences.

    Attributes:
        path: folder written by ``ringattn prepare``.
        mixture: folders with their weights, such as {data/code: 0.7, data/books: 0.3}, read in
            place of `path`: each supplies its share of the tokens. All need one tokenizer.
        seq_len: tokens per packed sequence, shared by the cp ranks. With `curriculum` it is the
            length of the held-out sequences alone.
        curriculum: [step, tokens per sequence] pairs such as [[0, 2048], [200, 8192]]: from that
            step on, training sequences have that length.
        source: what to prepare `path` from when it does not exist: a file, a folder, or "stdlib"
            (the Python standard library's own source). null: `path` must exist.
        tokenizer: tokenizer used for that preparation: "bytes" or a Hugging Face folder.
        max_document: longer documents are cut into documents of at most so many tokens when they
            are packed; null keeps them whole. Cutting makes the packs of a short run more alike.
        long_document, long_repeats: training documents of at least long_document tokens occur
            long_repeats times in every epoch of their corpus, shorter ones once.
    """

    path: str = "data/stdlib"
    mixture: dict[str, float] | None = None
    seq_len: int = 8192
    curriculum: tuple[tuple[int, int], ...] | None = None
    source: str | None = None
    tokenizer: str = "bytes"
    max_document: int | None = None
    long_document: int | None = None
    long_repeats: int = 1

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(step, tokens of a training sequence from that step on), the first from step 0."""
        return self.curriculum or ((0, self.seq_len),)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, training and held out."""
        return max(self.seq_len, *(length for _, length in self.stages))

    @property
    def corpora(self) -> list[tuple[str, float]]:
        """Folder and weight of every corpus."""
        return list(self.mixture.items()) if self.mixture else [(self.path, 1.0)]


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model: a named size or a Hugging Face folder; what is not null overrides a part of it.

    Attributes:
        hf: folder of a Hugging Face checkpoint (Llama, Qwen, Mistral): its config.json gives the
            shape in place of `size`, its safetensors files the first weights.
        window: sliding-window layers attend so many tokens, themselves included; null for none.
        full_every: with a window, every so-manieth layer attends its whole document; 0 for none.
        rope_scaling: "none", "linear", "ntk", "yarn" or "llama3"; null as in the size.
        rope_factor: how many times the original context the rotary embedding is stretched to.
        rope_original_seq_len: context before the stretching.
    """

    size: str = "debug"
    hf: str | None = None
    layers: int | None = None
    dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    rope_theta: float | None = None
    tie_embeddings: bool | None = None
    window: int | None = None
    full_every: int | None = None
    rope_scaling: str | None = None
    rope_factor: float | None = None
    rope_original_seq_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The device mesh, and how parameters are spread over it.

    Attributes:
        cp: ranks that share every sequence. dp: groups of cp ranks, each with its own sequences.
        engine: "ddp" keeps the whole model on every rank; "fsdp" shards it over all dp × cp ranks
            with PyTorch's `fully_shard`; "deepspeed" with DeepSpeed ZeRO.
        zero_stage: of deepspeed: 1 shards the optimizer, 2 gradients too, 3 parameters too.
        reshard: of fsdp: layers give up gathered parameters after the forward, and gather them
            again for the backward.
        offload: "optimizer" keeps optimizer states in host memory and updates there (deepspeed),
            "parameters" keeps sharded parameters there too (fsdp, deepspeed with zero_stage 3).
        min_cp: packs may run on fewer ranks, down to so many, where that is predicted to be faster
            (needs attention.cluster); null runs every pack on cp ranks.
        elastic: under a launcher with another number of ranks than dp × cp, as after the loss of a
            node, dp, cp and train.accumulate follow it, so that a step reads the same packs.
        ranks_per_node: consecutive ranks that share a node's fast links; null asks the launcher.
    """

    cp: int = 1
    dp: int = 1
    engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    zero_stage: int = 3
    reshard: bool = True
    offload: Literal["none", "optimizer", "parameters"] = "none"
    min_cp: int | None = None
    elastic: bool = False
    ranks_per_node: int | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is kept from forward to backward, and where.

    Attributes:
        checkpointing: "none" keeps all activations; "full" keeps each layer's input and computes
            the rest again, attention included; "attention" keeps attention outputs too, so that no
            attention runs twice; "sequence" keeps those of the rows that are costly to compute,
            and computes the cheap rows again.
        recompute: of "sequence": share of the attention forward that may be computed again.
        offload: what checkpointing keeps waits in host memory.
        token_tile: norms, projections and MLPs work on so many tokens at a time; null: on all.
    """

    checkpointing: Literal["none", "full", "attention", "sequence"] = "none"
    recompute: float = 0.25
    offload: bool = False
    token_tile: int | None = None

    @property
    def recomputed(self) -> float | None:
        """`recompute` where it applies."""
        return self.recompute if self.checkpointing == "sequence" else None


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How the cp ranks compute attention together; names as in `ringattn.ContextParallel`.

    Attributes:
        method, layout, kernel: names, or "auto".
        wire_dtype: dtype of travelling partial results; null is the accumulators' float32, "auto"
            what is predicted to be faster on the cluster.
        cluster: name or YAML file of the cluster on which "auto" is chosen by predicted time; null
            weighs mask area and bytes at a fixed rate.
        u: head-parallel degree of usp, loongtrain, hybrid and ulysses; null leaves it to the method
            or the cluster.
        stages: receive buffers' worth of rows of direct and hybrid; null likewise.
        save: ulysses, usp, loongtrain and hybrid keep q, k and v of their heads for the backward,
            which then moves less.
        refine: plans that a search for a better layout may price on the cluster; 0 for none.
    """

    method: str = "auto"
    layout: str = "auto"
    kernel: str = "auto"
    wire_dtype: Literal["fp32", "bf16", "auto"] | None = None
    cluster: str | None = None
    u: int | None = None
    stages: int | None = None
    save: bool = False
    refine: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, evaluation and what is printed.

    Attributes:
        steps: optimizer steps of the whole run.
        dtype: "bf16" computes in bfloat16 over float32 master weights.
        accumulate: micro-batches (packs) per dp rank and step.
        lr, min_lr: peak and final learning rate of warm-up + cosine.
        clip_norm: global gradient norm above which gradients are scaled down; 0 turns it off.
        deterministic: only deterministic PyTorch kernels; equal runs are bitwise equal.
        threads_per_rank: CPU threads of each rank; null shares the cores among local ranks.
        eval_every: steps between evaluations on the held-out split; 0 evaluates at the end only.
        eval_packs: held-out sequences per evaluation.
        log_every: steps between progress lines where stderr is not a terminal.
        compile: compile the parts of each layer around attention with `torch.compile`.
        profile: "START:STOP" traces the steps START <= step < STOP.
    """

    steps: int = 1000
    dtype: Literal["fp32", "bf16"] = "fp32"
    accumulate: int = 1
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    deterministic: bool = False
    threads_per_rank: int | None = None
    eval_every: int = 0
    eval_packs: int = 8
    log_every: int = 10
    profile: str | None = None
    compile: bool = False

    @property
    def profile_steps(self) -> range:
        """Steps to trace; empty without `profile`. Raises ValueError when it is malformed."""
        if self.profile is None:
            return range(0)
        start, stop = self.profile.split(":")
        return range(int(start), int(stop))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints under ``run.dir/checkpoints``.

    Attributes:
        every: steps between checkpoints; 0 saves at the end only.
        resume: "auto" continues from the newest complete one if any, "never" starts anew in a run
            folder without checkpoints, anything else is the path of one ``step-…`` folder.
        weights: a ``step-…`` folder of another run, or that run's folder: a run that does not
            resume takes the model's weights from it, and nothing else: step 0, a new optimizer, any
            data, sequence length and RoPE scaling.
        keep: newest checkpoints to keep; 0 keeps all.
        keep_every: checkpoints of steps that it divides are kept for good; 0 for none.
        background: training goes on while a checkpoint is written.
        on_error: when a checkpoint cannot be written, as on a full disk: "stop", or "continue" with
            a warning and try again at the next one.
    """

    every: int = 0
    resume: str = "auto"
    weights: str | None = None
    keep: int = 3
    keep_every: int = 0
    background: bool = True
    on_error: Literal["stop", "continue"] = "stop"


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """What to do about steps that go wrong. Ranks decide together.

    Attributes:
        on_nonfinite: a step's loss or gradient norm is NaN or infinite: "stop"; "skip" its update;
            "rollback" to the newest checkpoint and go on with the data after that step.
        on_spike: likewise when the loss exceeds spike_factor times its mean over the last
            spike_window steps; "ignore" looks for none.
        on_data_error: records that cannot be read: "stop", or "skip" their step.
        max_in_a_row: so many skipped or rolled-back steps without a good one between stop the run.
        straggler_factor: a rank is named when its own work takes so many times the median of all
            ranks, straggler_steps steps in a row; 0 looks for none.
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    spike_factor: float = 2.0
    spike_window: int = 50
    on_data_error: Literal["stop", "skip"] = "stop"
    max_in_a_row: int = 5
    straggler_factor: float = 1.5
    straggler_steps: int = 5


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training run."""

    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    @property
    def world(self) -> int:
        """Ranks of the run: dp × cp."""
        return self.parallel.dp * self.parallel.cp

    @property
    def packs_per_step(self) -> int:
        """Sequences that one optimizer step reads, over all dp ranks and micro-batches."""
        return self.parallel.dp * self.train.accumulate

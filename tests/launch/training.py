"""Tiny training runs for the tests: in pooled ranks, or through the real command."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import ringattn as ra
from ringattn.launch import trainer
from ringattn.launch.config import Config
from ringattn.launch.config_load import config_from_values, dump_config
from ringattn.launch.engine_deepspeed import DeepSpeedEngine
from ringattn.launch.engine_replicated import ReplicatedEngine
from ringattn.launch.feed import take_share
from ringattn.launch.job import COMPUTE_DTYPES, open_job
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.packing import IGNORE
from ringattn.launch.prepare import prepare
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import Session
from ringattn.launch.train import check_before_start
from ringattn.launch.trainer import Trainer
from ringattn.parallel.grads import GradientBuckets
from tests.launch.corpora import write_jsonl
from tests.ranks import TIMEOUT, run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


def uneven_corpus(folder: Path) -> Path:
    """A byte corpus in which counted tokens are spread very unevenly over packs and shards.

    One-character documents leave half of their positions uncounted, long ones nearly none.
    """

    long = [
        f"{i} " + "the quick brown fox jumps over the lazy dog; " * (2 + i % 6) for i in range(60)
    ]
    short = [[chr(97 + i % 26)] * (i % 4) for i in range(60)]
    texts = [text for one, many in zip(long, short, strict=True) for text in (one, *many)]
    out = folder / "corpus"
    prepare(write_jsonl(folder / "texts.jsonl", texts), out, holdout=0.1, seed=1)
    return out


def tiny_values(corpus: Path, run_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Dotted values of a tiny run; overrides use ``__`` for the dot."""
    values = {
        "seed": 7,
        "run.dir": str(run_dir),
        "run.device": "cpu",
        "run.timeout_s": 60.0,
        "data.path": str(corpus),
        "data.seq_len": 160,
        "model.size": "debug",
        "model.layers": 2,
        "model.dim": 32,
        "model.heads": 4,
        "model.kv_heads": 2,
        "model.head_dim": 8,
        "train.steps": 20,
        "train.lr": 3e-3,
        "train.warmup_steps": 4,
        "train.eval_packs": 3,
        "train.threads_per_rank": 1,
    }
    return values | {key.replace("__", "."): value for key, value in overrides.items()}


Mutation = str | Callable[[], Any] | None  # a name of MUTATIONS, or what makes a patch


def train_pooled(values: dict[str, Any], mutation: Mutation = None) -> list[dict[str, Any]]:
    """Trains on pooled ranks; returns the lines of metrics.jsonl."""
    config = config_from_values(values)
    check_before_start(config)
    run_ranks(config.world, _train_on_rank, values, mutation)
    return read_lines(Path(config.run.dir) / METRICS_FILE)


def _train_on_rank(
    rank: int, world: int, _group: Any, values: dict[str, Any], mutation: Mutation
) -> None:
    config = config_from_values(values)
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world)
    timeout = timedelta(seconds=config.run.timeout_s)
    shared = config.run.device == "cuda_shared"
    device = torch.device("cuda", 0) if shared else torch.device("cpu")
    session = Session(ranks=ranks, device=device, timeout=timeout, shared=shared)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if mutation is not None:
            patch = MUTATIONS[mutation] if isinstance(mutation, str) else mutation
            stack.enter_context(patch())
        Trainer(open_job(config, world), session).fit()


def _divide_by_local_count() -> Any:
    """The classic mistake: every rank's mean loss, averaged over ranks."""
    step = Trainer._train_step

    def broken(self: Trainer, batch: Any, began: float) -> Any:
        backward = self.engine.backward

        def local_mean(loss: torch.Tensor, *, last: bool) -> None:
            (micro,) = batch.micro
            share = take_share(micro, self.session.device)
            count = int((share.labels_BT != IGNORE).sum())
            backward(loss * batch.valid_tokens / max(count, 1) / self.config.world, last=last)

        with mock.patch.object(self.engine, "backward", local_mean):
            return step(self, batch, began)

    return mock.patch.object(Trainer, "_train_step", broken)


def _average_gradients() -> Any:
    """The mean over ranks in place of the sum."""
    reduce = GradientBuckets.reduce

    def broken(self: GradientBuckets) -> None:
        reduce(self)
        for bucket in self.buckets:
            bucket /= dist.get_world_size()

    return mock.patch.object(GradientBuckets, "reduce", broken)


def _average_sharded_gradients() -> Any:
    """The mean over ranks that FSDP2 and DeepSpeed take when nothing else is said."""
    backward, factor = DeepSpeedEngine.backward, FSDPModule.set_gradient_divide_factor

    def mean(self: DeepSpeedEngine, loss: torch.Tensor, *, last: bool) -> None:
        backward(self, loss / dist.get_world_size(), last=last)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(DeepSpeedEngine, "backward", mean))
    stack.enter_context(
        mock.patch.object(
            FSDPModule,
            "set_gradient_divide_factor",
            lambda self, _: factor(self, float(dist.get_world_size())),
        )
    )
    return stack


def _shift_after_sharding() -> Any:
    """Labels shifted on the shard, so that the last token of each shard loses its label."""

    def broken(micro: Any, device: torch.device) -> Any:
        share = take_share(micro, device)
        labels = share.tokens_BT.roll(-1, 1)
        labels[share.labels_BT == IGNORE] = IGNORE
        return type(share)(share.tokens_BT, labels, share.positions_T, share.attend)

    return mock.patch.object(trainer, "take_share", broken)


def _local_positions() -> Any:
    """Rotary positions counted from each rank's own first token."""

    def broken(micro: Any, device: torch.device) -> Any:
        share = take_share(micro, device)
        positions = torch.arange(len(share.positions_T))
        return type(share)(share.tokens_BT, share.labels_BT, positions, share.attend)

    return mock.patch.object(trainer, "take_share", broken)


def _rank_with_no_tokens() -> Any:
    """No mistake: a layout that leaves the second rank without any token."""

    def build(
        config: Config, shape: Any, group: Any, staged: str | None = None, topology: Any = None
    ) -> ra.ContextParallel:
        del topology
        seq_len, cp = config.data.seq_len, config.parallel.cp
        sizes = [seq_len - 10 * (cp - 2), 0, *[10] * (cp - 2)]
        return ra.ContextParallel(
            group,
            heads=(shape.heads, shape.kv_heads),
            head_dim=shape.head_dim,
            dtype=COMPUTE_DTYPES[config.train.dtype],
            layout=ra.layouts.contiguous(seq_len, cp, sizes),
            staged=staged,
        )

    return mock.patch.object(trainer, "build_context", build)


def _clip_before_the_sum() -> Any:
    """Clipping by this rank's own gradient norm."""
    step = ReplicatedEngine.step

    def broken(self: ReplicatedEngine, rate: float) -> torch.Tensor:
        norm = self._buckets.clip(self._clip_norm)
        with mock.patch.object(self._buckets, "clip", return_value=norm):
            return step(self, rate)

    return mock.patch.object(ReplicatedEngine, "step", broken)


MUTATIONS: dict[str, Callable[[], Any]] = {
    "divide by the local count": _divide_by_local_count,
    "average gradients": _average_gradients,
    "average sharded gradients": _average_sharded_gradients,
    "shift after sharding": _shift_after_sharding,
    "local positions": _local_positions,
    "clip before the sum": _clip_before_the_sum,
    "a rank with no tokens": _rank_with_no_tokens,
}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Writes the values as a YAML config."""
    path.write_text(dump_config(config_from_values(values)))
    return path


def command(
    *arguments: str,
    launcher: tuple[str, ...] = (),
    outer: tuple[str, ...] = (),
    program: tuple[str, ...] = ("-m", "ringattn.launch"),
    variables: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> subprocess.Popen[str]:
    """Starts ``ringattn ARGUMENTS`` in a process group of its own, optionally under a launcher.

    Args:
        arguments: of the command.
        launcher: what Python runs in place of the command, such as torchrun's module.
        outer: what starts Python, such as mpiexec.
        program: the command, as the launcher wants it named.
        variables: of its environment, which has none of other launchers.
        log: file that its output is appended to; None for pipes.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(key, None)
    environment |= variables or {}
    with contextlib.nullcontext(subprocess.PIPE) if log is None else log.open("a") as output:
        return subprocess.Popen(
            [*outer, sys.executable, *launcher, *program, *arguments],
            stdout=output,
            stderr=output,
            text=True,
            env=environment,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Waits for a command; returns exit code, stdout, stderr. Kills its whole group when late."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end within {TIMEOUT:g} s\n{out}\n{err}") from None
    return process.returncode, out, err


def run_command(
    *arguments: str,
    launcher: tuple[str, ...] = (),
    outer: tuple[str, ...] = (),
) -> tuple[int, str, str]:
    """Runs ``ringattn ARGUMENTS`` to its end."""
    return finish(command(*arguments, launcher=launcher, outer=outer))


def graphs_without_a_compiler() -> Any:
    """`torch.compile` with Dynamo and autograd as in earnest, but no code is generated."""
    torch.compiler.reset()
    return mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager"))


def parity_errors(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative errors of losses and gradient norms over all steps."""
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    return {
        key: max(abs(b[key] - a[key]) / abs(a[key]) for a, b in zip(expected, got, strict=True))
        for key in ("loss", "grad_norm")
    }


def assert_parity(
    expected: list[dict[str, Any]], got: list[dict[str, Any]], tolerance: float = 1e-5
) -> None:
    """Losses and gradient norms of every step agree within a relative tolerance.

    The norm is compared too: AdamW and clipping hide a constant factor on all gradients.
    """
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for want, have in zip(expected, got, strict=True):
        for key in ("loss", "grad_norm"):
            error = abs(have[key] - want[key]) / abs(want[key])
            assert error <= tolerance, f"step {want['step']} {key}: {have[key]} is not {want[key]}"

"""The training loop of one rank."""

import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.checkpoint import (
    FORMAT_VERSION,
    CheckpointState,
    load_tensors,
    save_checkpoint,
)
from ringattn.launch.control import StepControl
from ringattn.launch.data_loader import Loader, StepBatch
from ringattn.launch.degree_feed import open_degrees
from ringattn.launch.engine import open_engine
from ringattn.launch.evaluate import evaluate
from ringattn.launch.feed import LayerPlans, open_loader, own_areas, step_batches, take_share
from ringattn.launch.flops import flops_per_step
from ringattn.launch.initial_weights import load_weights
from ringattn.launch.job import Job, build_context
from ringattn.launch.metrics import EvalMetrics, MetricsWriter, StepMetrics, peak_flops
from ringattn.launch.profile import StepProfiler
from ringattn.launch.progress import ProgressLine
from ringattn.launch.run_folder import open_run_folder
from ringattn.launch.schedule import learning_rate
from ringattn.launch.session import Session
from ringattn.launch.summary import write_summary
from ringattn.launch.weights import weight_source
from ringattn.parallel.mesh import build_mesh

_RNG = "rng/cpu"


class Trainer:
    """One rank of a run: builds mesh, model and attention, then trains.

    Every rank makes one and calls `fit`; both communicate.

    Args:
        job: the checked run.
        session: what this rank runs on.
    """

    def __init__(self, job: Job, session: Session) -> None:
        self.job, self.config, self.session = job, job.config, session
        parallel = self.config.parallel
        self.mesh = build_mesh(
            session.device.type, dp=parallel.dp, cp=parallel.cp, timeout=session.timeout
        )
        torch.manual_seed(self.config.seed)
        weights = weight_source(self.config, job.shape)
        self.engine = open_engine(self.config, job.shape, session.device, self.mesh, weights)
        staged = "cuda" if session.shared else None
        try:
            self.cp = build_context(self.config, job.shape, self.mesh.cp_mesh, staged)
            self.degrees = open_degrees(job, self.cp, session.timeout, staged)
            contexts = [self.cp] if self.degrees is None else self.degrees.contexts.values()
            session.where.places += [context.place for context in contexts]
            self.start, origin = self._restore()
        except BaseException:
            self.engine.close()
            raise
        self._saved = self.start  # the newest step whose state is stored
        self.batches = step_batches(self.config, self.start, origin)
        self.run_dir = Path(self.config.run.dir)
        self._peak = peak_flops(session.device)
        self._writer: MetricsWriter | None = None
        self._progress: ProgressLine | None = None

    def fit(self) -> None:
        """Trains to ``train.steps``, evaluating, saving and reporting as configured; once."""
        try:
            self._fit()
        finally:
            self.engine.close()

    def _fit(self) -> None:
        train = self.config.train
        if self.session.is_main:
            open_run_folder(self.job)
            self._writer = MetricsWriter(self.run_dir, self.start)
            self._progress = ProgressLine(self.start, train.steps, train.log_every)
        self.session.barrier()
        last_eval, finished = None, False
        try:
            finished, last_eval = self._run_steps()
            if finished and self.start == train.steps:
                last_eval = self._evaluate(train.steps, record=False)
        finally:
            for part in (self._progress, self._writer):
                if part is not None:
                    part.close()
        self.session.where.enter("finishing")
        if self.session.is_main and finished:
            write_summary(self.job, self.engine.whole_model(), last_eval)
        self.session.barrier()

    def _run_steps(self) -> tuple[bool, EvalMetrics | None]:
        """Trains from ``self.start`` on.

        Returns:
            Whether the last step is done, else a scheduler wants the job to end and its state is
            saved; and the last step's evaluation.
        """
        train, where = self.config.train, self.session.where
        trace = self.run_dir / "profile" / f"rank{self.mesh.rank}.json"
        control = StepControl(self.mesh.world, self.session.request)
        last_eval = None
        with self._open_loader() as loader, StepProfiler(train.profile_steps, trace) as profiler:
            began = time.perf_counter()
            for batch in loader:
                where.enter("training", batch.step + 1, watched=batch.step > self.start)
                if control.agree().stop:
                    self._leave_early(batch.step)
                    return False, last_eval
                profiler.before(batch.step)
                metrics = self._train_step(batch, began)
                profiler.after(batch.step)
                last_eval = self._after_step(metrics)
                where.enter("loading data", batch.step + 2)
                began = time.perf_counter()
        return True, last_eval

    def _open_loader(self) -> Loader[LayerPlans]:
        return open_loader(
            self.job.train,
            self.batches,
            self.cp,
            self.mesh.dp_rank,
            range(self.start, self.config.train.steps),
            self.job.shape.windows,
            self.degrees and self.degrees.deal,
            self.config.memory.recomputed,
        )

    def _leave_early(self, step: int) -> None:
        """Saves the state after `step` steps, for a scheduler that wants the job to end."""
        if step > self.start and step != self._saved:
            self._save(step)
        if self._progress is not None:
            asked = self.session.request.signal or "a signal to another rank"
            self._progress.note(
                f"stopped after step {step} ({asked}); the same command goes on from there"
            )

    def _train_step(self, batch: StepBatch[LayerPlans], began: float) -> StepMetrics:
        """One optimizer step. The loss is summed over ranks and divided by the step's counted
        tokens, never averaged per rank: ranks hold different numbers of counted tokens."""
        valid = max(batch.valid_tokens, 1)
        # Loss sum of this rank, and each layer's mask area, which counts once per pack.
        layers = self.job.shape.layers
        sums = torch.zeros(1 + layers, dtype=torch.float64, device=self.session.device)
        areas = torch.zeros(layers, dtype=torch.float64)
        for index, micro in enumerate(batch.micro):
            share = take_share(micro, self.session.device)
            loss = self.engine.loss_sum(
                share.tokens_BT, share.labels_BT, share.positions_T, share.attend
            )
            self.engine.backward(loss / valid, last=index == len(batch.micro) - 1)
            sums[0] += loss.detach()
            areas += torch.tensor(own_areas(micro), dtype=torch.float64)
        sums[1:] = areas
        rate = learning_rate(self.config.train, batch.step)
        norm = self.engine.step(rate)
        dist.all_reduce(sums, group=self.mesh.world)
        loss_sum, *area = sums.tolist()
        if not math.isfinite(loss_sum):
            # Every rank sees the same sum. Nothing is saved after this step.
            raise UserError(
                f"loss={loss_sum}",
                f"step {batch.step + 1} must have a finite loss",
                "lower train.lr and resume from the last checkpoint",
            )
        step_s = time.perf_counter() - began
        tokens = self.batches.tokens(batch.step)
        mfu = None
        if self._peak is not None:
            flops = flops_per_step(self.job.shape, tokens, [int(a) for a in area])
            mfu = flops / (step_s * self._peak * self.config.world)
        return StepMetrics(
            step=batch.step + 1,
            loss=loss_sum / valid,
            tokens=tokens,
            step_s=step_s,
            tokens_per_s=tokens / step_s,
            grad_norm=float(norm),
            lr=rate,
            mfu=mfu,
            degrees=self.degrees and [micro.plan[0].world for micro in batch.micro],
        )

    def _after_step(self, metrics: StepMetrics) -> EvalMetrics | None:
        """Reports the step, and evaluates and saves when due; returns the evaluation if any."""
        train, step = self.config.train, metrics.step
        if self._writer is not None and self._progress is not None:
            self._writer.write_step(metrics)
            self._progress.show(metrics)
        done = step == train.steps
        result = None
        if done or (train.eval_every and step % train.eval_every == 0):
            result = self._evaluate(step)
        every = self.config.checkpoint.every
        if done or (every and step % every == 0):
            self._save(step)
        return result

    def _evaluate(self, step: int, *, record: bool = True) -> EvalMetrics | None:
        """Held-out loss, recorded unless an earlier process did; None without a held-out split."""
        if self.job.heldout is None:
            return None
        self.session.where.enter("evaluating", step)
        result = evaluate(
            self.engine,
            self.job.heldout,
            self.cp,
            self.mesh,
            self.session.device,
            step=step,
            packs=self.config.train.eval_packs,
            windows=self.job.shape.windows,
        )
        if record and self._writer is not None and self._progress is not None:
            self._writer.write_eval(result)
            self._progress.note(f"step {step}  held-out loss {result.loss:.4f}")
        return result

    def _save(self, step: int) -> None:
        self.session.where.enter("saving", step)
        self._saved = step
        state = CheckpointState(
            format_version=FORMAT_VERSION,
            step=step,
            position=self.batches.position(step),
            identity=json.loads(json.dumps(self.job.identity)),
            config=asdict(self.config),
        )
        # Every random draw of a run is made on the CPU from this generator, alike on all ranks.
        tensors = {**self.engine.tensors(), _RNG: torch.get_rng_state()}
        save_checkpoint(
            self.run_dir,
            tensors,
            state,
            is_main=self.session.is_main,
            barrier=self.session.barrier,
            keep=self.config.checkpoint.keep,
        )

    def _restore(self) -> tuple[int, int]:
        """Loads the job's checkpoint, or the weights to start from.

        Returns:
            The steps done, and the tokens read by them.
        """
        if self.job.checkpoint is None:
            if self.job.weights is not None:
                self.engine.load(partial(load_weights, self.job.weights))
            return 0, 0
        path, state = self.job.checkpoint
        rng = torch.get_rng_state()
        self.engine.load(lambda tensors: load_tensors(path, {**tensors, _RNG: rng}))
        torch.set_rng_state(rng)
        return state.step, state.position

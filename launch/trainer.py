"""The training loop of one rank."""

import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.control import StepControl
from ringattn.launch.data_loader import Loader, StepBatch
from ringattn.launch.degree_feed import open_degrees
from ringattn.launch.engine import open_engine
from ringattn.launch.evaluate import evaluate
from ringattn.launch.events import EventLog
from ringattn.launch.feed import LayerPlans, open_loader, own_areas, step_batches, take_share
from ringattn.launch.flops import flops_per_step
from ringattn.launch.guard import RollBack
from ringattn.launch.job import Job, build_context
from ringattn.launch.metrics import EvalMetrics, StepMetrics, peak_flops
from ringattn.launch.profile import StepProfiler
from ringattn.launch.restart import FolderClaim, restart_count
from ringattn.launch.run_folder import open_run_folder
from ringattn.launch.run_log import RunLog
from ringattn.launch.saver import Saver
from ringattn.launch.schedule import learning_rate
from ringattn.launch.session import Session
from ringattn.launch.step_faults import StepFaults
from ringattn.launch.straggler import OwnWork, slowest
from ringattn.launch.summary import write_summary
from ringattn.launch.weights import weight_source
from ringattn.parallel.mesh import build_mesh


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
        self.run_dir = Path(self.config.run.dir)
        self.log = RunLog(self.config, active=session.is_main)
        staged = "cuda" if session.shared else None
        try:
            self.saver = Saver(
                job, self.engine, self.mesh, session.device, session.timeout, self.log.warn
            )
            topology = session.topology
            self.cp = build_context(self.config, job.shape, self.mesh.cp_mesh, staged, topology)
            self.degrees = open_degrees(job, self.cp, session.timeout, staged, topology)
            contexts = [self.cp] if self.degrees is None else self.degrees.contexts.values()
            session.where.places += [context.place for context in contexts]
            self._own_work = OwnWork(session.device)
            self.engine.around_waits(self._own_work.pause, self._own_work.resume)
            self.faults = StepFaults(self.config, self.mesh.world, self.mesh.rank, self.log.note)
            found = self.saver.restore()
        except BaseException:
            self.engine.close()
            raise
        self.start = found.step  # steps done
        self.faults.guard.restore(found.guard)
        self.batches = step_batches(self.config, found.step, found.position)
        self._peak = peak_flops(session.device)
        self._claim: FolderClaim | None = None

    def fit(self) -> None:
        """Trains to ``train.steps``, evaluating, saving and reporting as configured; once.

        Ends earlier, in order and with everything saved, when a scheduler asks for it.
        """
        try:
            self._fit()
        except BaseException as error:
            self.saver.close(error)
            raise
        finally:
            self.engine.close()
            if self._claim is not None:
                self._claim.release()

    def _fit(self) -> None:
        if self.session.is_main:
            self._claim = open_run_folder(self.job)
            if count := restart_count(os.environ):
                EventLog(self.run_dir).write("restart", self.start, f"restart {count} of all ranks")
        self.session.barrier()
        result, finished = None, False
        try:
            while True:
                self.log.open(self.start)
                try:
                    finished, result = self._run_steps()
                    break
                except RollBack as bad:
                    self._roll_back(bad)
            if finished and self.start == self.config.train.steps:
                result = self._evaluate(self.start, record=False)
            self.session.where.enter("finishing")
            self.saver.wait(last=True)
        finally:
            self.log.close()
        if self.session.is_main and finished:
            write_summary(self.job, self.engine.whole_model(), result, self.log.policy)
        self.session.barrier()

    def _run_steps(self) -> tuple[bool, EvalMetrics | None]:
        """Trains from ``self.start`` on.

        Returns:
            Whether the last step is done, else a scheduler wants the job to end and its state is
            saved; and the last step's evaluation.

        Raises:
            RollBack: a step went so wrong that the run is to go back.
        """
        train, where = self.config.train, self.session.where
        trace = self.run_dir / "profile" / f"rank{self.mesh.rank}.json"
        control = StepControl(self.mesh.world, self.session.request)
        self.session.request.heard = True
        result = None
        with self._open_loader() as loader, StepProfiler(train.profile_steps, trace) as profiler:
            began = time.perf_counter()
            for batch in loader:
                where.enter("training", batch.step + 1, watched=batch.step > self.start)
                wanted = control.agree(
                    unreadable=batch.error is not None, unsaved=self.saver.failed
                )
                if wanted.unsaved:
                    self.saver.wait()
                if wanted.stop:
                    self._leave_early(batch.step)
                    return False, result
                if wanted.unreadable:
                    metrics = self._leave_out(batch, began)
                else:
                    profiler.before(batch.step)
                    metrics = self._train_step(batch, began)
                    profiler.after(batch.step)
                result = self._after_step(metrics)
                where.enter("loading data", batch.step + 2)
                began = time.perf_counter()
        return True, result

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

    def _roll_back(self, bad: RollBack) -> None:
        """Restores the newest checkpoint, and goes on with the data after the bad step."""
        self.session.where.enter("rolling back", bad.step)
        found = self.saver.restore()
        self.start = found.step
        self.faults.guard.roll_back(found.guard)
        self.batches = step_batches(self.config, found.step, bad.position)
        self.log.note(f"back to step {found.step}: {bad}")

    def _save_early(self, step: int) -> None:
        """Saves the state after `step` steps, where that is not stored yet."""
        self.saver.wait()
        if step > self.saver.stored:
            self._save(step)

    def _leave_early(self, step: int) -> None:
        """Saves the state after `step` steps, for a scheduler that wants the job to end."""
        self._save_early(step)
        self.saver.wait(last=True)
        if self.session.is_main:
            asked = self.session.request.signal or "a signal to another rank"
            text = f"stopped after step {step} ({asked}); the same command goes on from there"
            EventLog(self.run_dir).write("preemption", step, text)
            self.log.note(text)

    def _train_step(self, batch: StepBatch[LayerPlans], began: float) -> StepMetrics:
        """One optimizer step. The loss is summed over ranks and divided by the step's counted
        tokens, never averaged per rank: ranks hold different numbers of counted tokens."""
        valid = max(batch.valid_tokens, 1)
        # Loss sum of this rank, each layer's mask area, which counts once per pack, and seconds of
        # own work, in a place for each rank.
        layers, world = self.job.shape.layers, self.mesh.world.size()
        sums = torch.zeros(1 + layers + world, dtype=torch.float64, device=self.session.device)
        areas = torch.zeros(layers, dtype=torch.float64)
        for index, micro in enumerate(batch.micro):
            with self._own_work.forward():
                share = self._own_work.timed(take_share(micro, self.session.device))
                loss = self.engine.loss_sum(
                    share.tokens_BT, share.labels_BT, share.positions_T, share.attend
                )
            self.engine.backward(loss / valid, last=index == len(batch.micro) - 1)
            sums[0] += loss.detach()
            areas += torch.tensor(own_areas(micro), dtype=torch.float64)
        sums[1 : 1 + layers] = areas
        sums[1 + layers + self.mesh.rank] = self._own_work.take()
        dist.all_reduce(sums, group=self.mesh.world)
        loss_sum, *others = sums.tolist()
        area, seconds = others[:layers], others[layers:]
        loss, norm = loss_sum / valid, math.nan
        rate = learning_rate(self.config.train, batch.step)
        # Every rank sees the same sum and norm, and judges alike.
        step = batch.step + 1
        verdict = self.faults.guard.judge(step, loss)
        if verdict.good:
            norm = float(self.engine.step(rate))
            verdict = self.faults.guard.judge(step, loss, norm)
        else:
            self.engine.discard()
        self.faults.settle(verdict, step, loss, self.batches.position(step))
        self.faults.name_stragglers(step, seconds)
        step_s = time.perf_counter() - began
        tokens = self.batches.tokens(batch.step)
        mfu = None
        if self._peak is not None:
            flops = flops_per_step(self.job.shape, tokens, [int(a) for a in area])
            mfu = flops / (step_s * self._peak * self.config.world)
        slow_rank, slow_ratio = slowest(seconds)
        return StepMetrics(
            step=step,
            loss=loss,
            tokens=tokens,
            step_s=step_s,
            tokens_per_s=tokens / step_s,
            grad_norm=norm,
            lr=rate,
            mfu=mfu,
            degrees=self.degrees and [micro.plan[0].world for micro in batch.micro],
            fault=verdict.fault,
            slowest_rank=slow_rank,
            slowest_ratio=slow_ratio,
        )

    def _leave_out(self, batch: StepBatch[LayerPlans], began: float) -> StepMetrics:
        """A step that some rank could not read: all ranks call it in place of the step.

        Where that ends the run, the state before the step is saved.
        """
        step, rate = batch.step + 1, learning_rate(self.config.train, batch.step)
        end = self.batches.position(step)
        try:
            return self.faults.leave_out(step, batch.error, end, rate=rate, began=began)
        except UserError:
            self._save_early(batch.step)
            raise

    def _after_step(self, metrics: StepMetrics) -> EvalMetrics | None:
        """Reports the step, and evaluates and saves when due; returns the evaluation if any."""
        train, step = self.config.train, metrics.step
        self.log.step(metrics)
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
        if record:
            self.log.evaluation(result)
        return result

    def _save(self, step: int) -> None:
        self.session.where.enter("saving", step)
        if self._claim is not None:
            self._claim.check()
        self.saver.save(step, self.batches.position(step), self.faults.guard.state())

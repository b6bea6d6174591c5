"""What becomes of bad steps: the decisions, and what they do to runs of every engine."""

import contextlib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ringattn.errors import UserError
from ringattn.launch import trainer
from ringattn.launch.checkpoint import find_checkpoints
from ringattn.launch.checkpoint_state import read_state
from ringattn.launch.config import FaultsConfig
from ringattn.launch.engine_deepspeed import DeepSpeedEngine
from ringattn.launch.engine_fsdp import FsdpEngine
from ringattn.launch.engine_replicated import ReplicatedEngine
from ringattn.launch.events import EVENTS_FILE, EventLog
from ringattn.launch.guard import Guard, RollBack
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.optimizer import set_learning_rate
from ringattn.parallel.grads import GradientBuckets, exact_norm
from tests.launch.checkpoints import stored_tensors
from tests.launch.engines import ENGINES, OFFLOADS
from tests.launch.training import tiny_values, train_pooled, uneven_corpus

RULES = FaultsConfig(
    on_nonfinite="skip", on_spike="rollback", spike_factor=2.0, spike_window=3, max_in_a_row=3
)


def settled(guard: Guard, step: int, loss: float, log: EventLog | None = None) -> str | None:
    """Judges and settles one step; returns the line about it."""
    return guard.settle(guard.judge(step, loss), step, loss, 100 * step, log)


def test_only_what_is_not_finite_is_bad_before_the_window_is_full() -> None:
    guard = Guard(RULES)
    assert guard.judge(1, 1e30).good
    assert [settled(guard, step, 4.0) for step in (1, 2)] == [None, None]
    assert guard.judge(3, 1e30).good
    for loss, norm in ((math.nan, None), (math.inf, None), (4.0, math.nan), (4.0, math.inf)):
        assert guard.judge(3, loss, norm).fault == "nonfinite: skip"
    assert guard.judge(3, 4.0, 1e30).good


def test_a_spike_is_measured_by_good_losses() -> None:
    guard = Guard(RULES)
    for step, loss in enumerate((9.0, 1.0, 2.0, 3.0), start=1):
        assert settled(guard, step, loss) is None
    assert guard.judge(5, 4.0).good  # twice the mean of 1, 2, 3
    assert guard.judge(5, math.nextafter(4.0, 5.0)).fault == "spike: rollback"
    with pytest.raises(RollBack) as caught:
        settled(guard, 5, 100.0)
    assert (caught.value.step, caught.value.position) == (5, 500)
    assert guard.judge(6, 4.1).fault == "spike: rollback"  # 100 was not taken into the mean
    quiet = Guard(replace(RULES, on_spike="ignore"))
    quiet.restore(guard.state())
    assert quiet.judge(6, 1e30).good


def test_so_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    guard, log = Guard(RULES), EventLog(tmp_path)
    for step, loss in enumerate((math.nan, math.nan, 1.0, math.nan, math.nan), start=1):
        line = settled(guard, step, loss, log)
        assert (line is None) == (loss == 1.0)
    with pytest.raises(UserError, match=r"3 steps in a row .*loss=nan.*faults\.max_in_a_row=3"):
        settled(guard, 6, math.nan, log)
    events = [(e["step"], e["event"]) for e in read_lines(tmp_path / EVENTS_FILE)]
    assert events == [
        *[(step, event) for step in (1, 2, 4, 5) for event in ("nonfinite", "skip")],
        (6, "nonfinite"),
        (6, "stop"),
    ]


def test_stop_names_step_and_value() -> None:
    guard = Guard(FaultsConfig())
    with pytest.raises(UserError, match="loss=nan: step 7 must have a finite loss; lower train.lr"):
        settled(guard, 7, math.nan)
    with pytest.raises(UserError, match="grad_norm=inf: step 7 must have a finite gradient norm"):
        guard.settle(guard.judge(7, 1.0, math.inf), 7, 1.0, 0, None)


def test_a_resumed_guard_judges_as_the_undisturbed_one() -> None:
    losses = [2.0, 3.0, math.nan, 1.0, 5.0, 2.5, math.nan, 4.1, 1.0, 4.6]

    def verdicts(guard: Guard, first: int) -> list[str | None]:
        found = []
        for step, loss in enumerate(losses[first:], start=first):
            verdict = guard.judge(step, loss)
            found.append(verdict.fault)
            try:
                guard.settle(verdict, step, loss, 0, None)
            except RollBack:
                found.append("back")
        return found

    undisturbed = Guard(RULES)
    for stop in range(len(losses)):
        resumed = Guard(RULES)
        resumed.restore(json.loads(json.dumps(undisturbed.state())))
        twin = Guard(RULES)
        twin.restore(undisturbed.state())
        assert verdicts(resumed, stop) == verdicts(twin, stop)
        assert resumed.state() == twin.state()
        verdict = undisturbed.judge(stop, losses[stop])
        if verdict.action != "rollback":
            undisturbed.settle(verdict, stop, losses[stop], 0, None)


def test_bad_steps_are_counted_across_rollbacks() -> None:
    guard = Guard(replace(RULES, on_nonfinite="rollback"))
    saved = guard.state()
    for step in (1, 2):
        with pytest.raises(RollBack):
            settled(guard, step, math.nan)
        guard.roll_back(saved)
    with pytest.raises(UserError, match="3 steps in a row"):
        settled(guard, 3, math.nan)


# Faults put into runs: patches that count the calls of a step. One micro-batch, so one a step.


def own_gradient(engine: ReplicatedEngine | FsdpEngine) -> torch.Tensor:
    """Some gradients that the engine holds before its step, flat."""
    if isinstance(engine, ReplicatedEngine):
        return engine._buckets.buckets[0]
    grads = [shard.grad for shard in engine._shards.values()]
    local = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    return next(grad for grad in local if grad.numel()).view(-1)


class Faults(contextlib.ExitStack):
    """The last rank's gradients of step 3 are NaN, and its loss of step 5 a thousandfold."""

    def __init__(self, spike: float = 1e3) -> None:
        super().__init__()
        calls = {"backward": 0, "loss": 0}

        def reaches(what: str, step: int) -> bool:
            calls[what] += 1
            return calls[what] == step and dist.get_rank() == dist.get_world_size() - 1

        for engine in (ReplicatedEngine, FsdpEngine, DeepSpeedEngine):

            def backward(
                self: Any, loss: torch.Tensor, *, last: bool, real: Any = engine.backward
            ) -> None:
                bad = reaches("backward", 3)
                if isinstance(self, DeepSpeedEngine):
                    real(self, loss * math.nan if bad else loss, last=last)
                    return
                real(self, loss, last=last)
                if bad:  # now, so that attention carries it to no other rank
                    own_gradient(self)[0] = math.nan

            def loss_sum(self: Any, *args: Any, real: Any = engine.loss_sum) -> torch.Tensor:
                loss = real(self, *args)
                return loss * spike if torch.is_grad_enabled() and reaches("loss", 5) else loss

            self.enter_context(mock.patch.object(engine, "backward", backward))
            self.enter_context(mock.patch.object(engine, "loss_sum", loss_sum))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def faulty_values(corpus: Path, run_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Six steps at cp = 2, each saved, that skip what is bad."""
    values = tiny_values(
        corpus,
        run_dir,
        parallel__cp=2,
        train__steps=6,
        checkpoint__every=1,
        checkpoint__keep=0,
        faults__on_nonfinite="skip",
        faults__on_spike="skip",
        faults__spike_window=2,
    )
    return values | {key.replace("__", "."): value for key, value in overrides.items()}


def comparable(line: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal bit by bit."""
    return tuple(line[key] for key in ("step", "loss", "grad_norm", "lr", "tokens", "fault"))


def check_skipped(values: dict[str, Any], lines: list[dict[str, Any]], folder: Path) -> None:
    """Steps 3 and 5 left nothing behind: steps after them are those of runs that begin there."""
    faults = [line["fault"] for line in lines]
    assert faults == [None, None, "nonfinite: skip", None, "spike: skip", None]
    assert [line["loss"] is None for line in lines] == [False] * 6
    assert [line["grad_norm"] is None for line in lines] == [i in (2, 4) for i in range(6)]
    run_dir = Path(values["run.dir"])
    saved = [stored_tensors(path) for path in find_checkpoints(run_dir)]
    for bad in (3, 5):
        before, after = saved[bad - 2], saved[bad - 1]
        assert all(torch.equal(before[key], after[key]) for key in before), f"step {bad}"
        fresh = values | {
            "run.dir": str(folder / f"from-{bad}"),
            "checkpoint.resume": str(find_checkpoints(run_dir)[bad - 1]),
        }
        line, *_ = train_pooled(fresh)
        assert comparable(line) == comparable(lines[bad])


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero 2"])
def test_a_skipped_step_leaves_nothing_behind(engine: str, corpus: Path, tmp_path: Path) -> None:
    values = faulty_values(corpus, tmp_path / "run") | ENGINES[engine]
    lines = train_pooled(values, Faults)
    check_skipped(values, lines, tmp_path)
    text = (tmp_path / "run" / METRICS_FILE).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    events = [(e["step"], e["event"]) for e in read_lines(tmp_path / "run" / EVENTS_FILE)]
    assert events == [(3, "nonfinite"), (3, "skip"), (5, "spike"), (5, "skip")]


class NothingDiscarded(Faults):
    """As `Faults`, but gradients of a skipped step stay and are added to the next one's."""

    def __init__(self) -> None:
        super().__init__()
        self.enter_context(mock.patch.object(ReplicatedEngine, "discard"))


class OwnGradients(Faults):
    """As `Faults`, but each rank leaves out the update by what its own gradients were."""

    def __init__(self) -> None:
        super().__init__()
        reduce, norms = GradientBuckets.reduce, [torch.zeros(())]

        def reduce_after_a_look(self: GradientBuckets) -> None:
            norms[0] = torch.stack([exact_norm(bucket) for bucket in self.buckets]).sum()
            reduce(self)

        def step(self: ReplicatedEngine, rate: float) -> torch.Tensor:
            self._buckets.reduce()
            norm = self._buckets.clip(self._clip_norm)
            if norms[0].isfinite():
                set_learning_rate(self._optimizer, rate)
                self._optimizer.step()
            self._buckets.zero()
            return norm

        self.enter_context(mock.patch.object(GradientBuckets, "reduce", reduce_after_a_look))
        self.enter_context(mock.patch.object(ReplicatedEngine, "step", step))
        # No text can be drawn from weights that are NaN.
        self.enter_context(mock.patch.object(trainer, "write_summary"))


def test_a_rollback_goes_on_with_the_data_after_the_bad_step(corpus: Path, tmp_path: Path) -> None:
    values = faulty_values(corpus, tmp_path / "run", faults__on_nonfinite="rollback")
    lines = train_pooled(values, partial(Faults, 1.0))
    assert [line["step"] for line in lines] == list(range(1, values["train.steps"] + 1))
    assert all(line["fault"] is None for line in lines)
    events = [(e["step"], e["event"]) for e in read_lines(tmp_path / "run" / EVENTS_FILE)]
    assert events[:2] == [(3, "nonfinite"), (3, "rollback")]
    saved = find_checkpoints(tmp_path / "run")
    # The third step reads the fourth pack.
    assert [read_state(path).position // 160 for path in saved][:3] == [1, 2, 4]
    # A run that goes on from there is the same run.
    fresh = values | {"run.dir": str(tmp_path / "fresh"), "checkpoint.resume": str(saved[2])}
    rest = train_pooled(fresh)
    assert [comparable(line) for line in rest] == [comparable(line) for line in lines[3:]]


@pytest.mark.parametrize("mistake", [NothingDiscarded, OwnGradients])
def test_mistakes_are_seen(mistake: type[Faults], corpus: Path, tmp_path: Path) -> None:
    values = faulty_values(corpus, tmp_path / "run", faults__max_in_a_row=7)
    lines = train_pooled(values, mistake)
    with pytest.raises(AssertionError):
        check_skipped(values, lines, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("offload", [None, "optimizer", "parameters"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_skipped_steps_under_every_engine(
    engine: str, dtype: str, offload: str | None, corpus: Path, tmp_path: Path
) -> None:
    if offload is not None and offload not in OFFLOADS[engine]:
        pytest.skip(f"{engine} does not offload {offload}")
    values = faulty_values(corpus, tmp_path / "run", train__dtype=dtype) | ENGINES[engine]
    if offload is not None:
        values["parallel.offload"] = offload
    check_skipped(values, train_pooled(values, Faults), tmp_path)


class NoChecks(Faults):
    """As `Faults`, with a DeepSpeed that does not look for infinite norms itself."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed.runtime import bf16_optimizer
        from deepspeed.runtime.zero import stage3, stage_1_and_2

        for module in (bf16_optimizer, stage3, stage_1_and_2):
            patch = mock.patch.object(module, "is_invalid_grad_norm", return_value=False)
            self.enter_context(patch)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_older_releases_of_deepspeed(stage: int, dtype: str, corpus: Path, tmp_path: Path) -> None:
    values = faulty_values(corpus, tmp_path / "run", train__dtype=dtype) | ENGINES[f"zero {stage}"]
    check_skipped(values, train_pooled(values, NoChecks), tmp_path)

"""What becomes of bad steps: the decisions, and what they do to runs of every engine."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints
from ringattn.launch.config import FaultsConfig
from ringattn.launch.engine_deepspeed import DeepSpeedEngine
from ringattn.launch.engine_fsdp import FsdpEngine
from ringattn.launch.engine_replicated import ReplicatedEngine
from ringattn.launch.events import EVENTS_FILE, EventLog
from ringattn.launch.guard import Guard, RollBack
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.trainer import Trainer
from tests.launch.engines import ENGINES
from tests.launch.training import tiny_values, train_pooled, uneven_corpus

# The first run in a pool of ranks imports DeepSpeed.
pytestmark = pytest.mark.timeout(300)

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


# Faults put into runs. Patches know a step by how often they were called.

_ENGINES = (ReplicatedEngine, FsdpEngine, DeepSpeedEngine)


def _patch_backward(change: Callable[[int, int, torch.Tensor], torch.Tensor]) -> Any:
    """`change(call, rank, loss)` in place of the loss that gradients are made from."""
    stack = mock.patch.multiple(Trainer)
    calls = [0]
    patches = [stack]
    for engine in _ENGINES:
        backward = engine.backward

        def changed(
            self: Any, loss: torch.Tensor, *, last: bool, backward: Any = backward
        ) -> None:
            calls[0] += 1
            backward(self, change(calls[0], dist.get_rank(), loss), last=last)

        patches.append(mock.patch.object(engine, "backward", changed))
    return _all(patches)


def _all(patches: list[Any]) -> Any:
    import contextlib

    stack = contextlib.ExitStack()
    for patch in patches:
        stack.enter_context(patch)
    return stack


def nan_gradient(step: int) -> Any:
    """The last rank's gradients of one step are NaN; its loss is not."""

    def change(call: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
        bad = call == step and rank == dist.get_world_size() - 1
        return loss * math.nan if bad else loss

    return _patch_backward(change)


def bad_loss(step: int, factor: float) -> Any:
    """The last rank's loss of one step is scaled after its forward."""
    patches, calls = [], [0]
    for engine in _ENGINES:
        loss_sum = engine.loss_sum

        def changed(self: Any, *args: Any, loss_sum: Any = loss_sum) -> torch.Tensor:
            loss = loss_sum(self, *args)
            if not torch.is_grad_enabled():
                return loss
            calls[0] += 1
            bad = calls[0] == step and dist.get_rank() == dist.get_world_size() - 1
            return loss * factor if bad else loss

        patches.append(mock.patch.object(engine, "loss_sum", changed))
    return _all(patches)

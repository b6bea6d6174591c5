"""Reads packs and makes their plans in a background thread, ahead of the training step."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.corpus import DataError
from ringattn.launch.packing import Batches, PackedDataset

PlanT = TypeVar("PlanT")
# What a rank reads of a step, from where its packs (accumulate, dp, batch) start and their length:
# the starts and the plan of each of its micro-batches. Called in the loader's thread.
Deal = Callable[[np.ndarray, int], list[tuple[list[int], PlanT]]]


@dataclass(frozen=True)
class MicroBatch(Generic[PlanT]):
    """`Batches.batch` packs laid end to end on one token axis, T = batch * packs' length.

    Attributes:
        tokens, labels: int64 (T,); labels are already shifted, `packing.IGNORE` where not counted.
        lengths: document segment lengths, their sum is T.
        plan: what `make_plan(lengths)` returned.
        starts: the packs' positions in the stream, in tokens.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: list[int]
    plan: PlanT
    starts: list[int]


@dataclass(frozen=True)
class StepBatch(Generic[PlanT]):
    """What one dp rank reads in one step.

    Attributes:
        step: the step's number.
        micro: one `MicroBatch` per accumulation micro-batch, or per round where packs are dealt.
        valid_tokens: labels that count, over all dp ranks and micro-batches of the step.
        error: why this rank could not read the step; `micro` is empty then.
    """

    step: int
    micro: list[MicroBatch[PlanT]]
    valid_tokens: int
    error: DataError | None = None


class Loader(Generic[PlanT]):
    """Iterates over the `StepBatch`es of steps start_step .. stop_step - 1, in order.

    A thread works up to `depth` steps ahead. Its exceptions are raised by `__next__`, those that
    are no `UserError` as a RuntimeError naming step and packs. Use it as a context manager, or
    call `close`: it ends the thread. No communication.

    Args:
        dataset: of the split to read.
        batches: the mapping from steps to packs.
        make_plan: called in the thread with the segment lengths of each micro-batch.
        dp_rank: this process's data-parallel rank.
        start_step, stop_step: the range of steps.
        depth: most steps kept ready.
        deal: chooses packs and plans in place of `dp_rank` and `make_plan`.
        keep_errors: steps whose records cannot be read are handed out with the `DataError`, and the
            next ones follow. Otherwise it is raised.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        batches: Batches,
        make_plan: Callable[[list[int]], PlanT],
        *,
        dp_rank: int = 0,
        start_step: int = 0,
        stop_step: int,
        depth: int = 2,
        deal: Deal[PlanT] | None = None,
        keep_errors: bool = False,
    ) -> None:
        if depth < 1:
            raise UserError(f"depth={depth}", "must be positive", "use 1 or more")
        if not 0 <= dp_rank < batches.dp:
            raise UserError(f"dp_rank={dp_rank}", f"must be in [0, {batches.dp})", "use 0")
        self._dataset, self._batches, self._make_plan = dataset, batches, make_plan
        self._dp_rank, self._depth, self._deal = dp_rank, depth, deal
        self._keep_errors = keep_errors
        self._steps = range(start_step, stop_step)
        self._changed = threading.Condition()
        self._ready: deque[StepBatch[PlanT]] = deque()
        self._error: BaseException | None = None
        self._finished = self._closed = False
        self._thread = threading.Thread(target=self._work, name="ringattn-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch[PlanT]]:
        return self

    def __next__(self) -> StepBatch[PlanT]:
        """Waits for the next step. Steps ready before an error are still handed out."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._closed:
                raise StopIteration
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Ends the thread and drops what it had ready. May be called twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Loader[PlanT]":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        return
                batch = self._load(step)
                with self._changed:
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify_all()
        except BaseException as caught:  # handed to the consumer, whatever it is
            error = caught
        finally:
            with self._changed:
                self._error, self._finished = error, True
                self._changed.notify_all()

    def _load(self, step: int) -> StepBatch[PlanT]:
        starts, seq_len = self._batches.starts(step), self._batches.seq_len(step)
        mine = starts[:, self._dp_rank].tolist()
        valid = sum(self._dataset.valid_tokens(int(start), seq_len) for start in starts.flat)
        try:
            if self._deal is None:
                micro = [self._micro_batch(places, seq_len) for places in mine]
            else:
                micro = [
                    self._micro_batch(places, seq_len, plan)
                    for places, plan in self._deal(starts, seq_len)
                ]
        except DataError as error:
            if not self._keep_errors:
                raise
            return StepBatch(step, [], valid, error)
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"loading step {step}, tokens from {mine} of {self._dataset.path} "
                f"({self._dataset.split}): {error}"
            ) from error
        return StepBatch(step, micro, valid)

    def _micro_batch(
        self, starts: list[int], seq_len: int, plan: PlanT | None = None
    ) -> MicroBatch[PlanT]:
        packs = [self._dataset.read(start, seq_len) for start in starts]
        lengths = [length for pack in packs for length in pack.lengths]
        tokens = np.concatenate([pack.tokens for pack in packs])
        labels = np.concatenate([pack.labels for pack in packs])
        if plan is None:
            plan = self._make_plan(lengths)
        return MicroBatch(tokens, labels, lengths, plan, starts)

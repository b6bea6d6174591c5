"""A thread that runs jobs in order, for fabrics."""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread

import torch


class Worker:
    """A thread that runs jobs one after another, and ends with this object or the process."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue = SimpleQueue()
        Thread(target=_work, args=(self._jobs,), daemon=True, name=name).start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, job: Callable[[], None]) -> "Future[None]":
        """Queues a job; its result is None, or what it raised."""
        future: Future[None] = Future()
        self._jobs.put((future, job))
        return future


def _work(jobs: SimpleQueue) -> None:
    while (taken := jobs.get()) is not None:
        future, job = taken
        try:
            # Buffers made in inference mode may be written in inference mode only.
            with torch.inference_mode():
                job()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        del taken, future, job  # or a waiting thread would hold on to the last batch

"""Agreement of the ranks on what each of them did, errors included."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ringattn.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class Peers:
    """The ranks of a group, which call every method together, each from one thread.

    Args:
        group: its collectives must be this object's alone while a method runs; None is a single
            process without peers.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    def agree(self, work: Callable[[], T], decide: Callable[[list[T]], R]) -> R:
        """Runs `work` on every rank, then `decide` on rank 0 with what they returned, by rank.

        One gather and one broadcast of small picklable values.

        Returns:
            What `decide` returned, on every rank.

        Raises:
            UserError, OSError, RuntimeError: on every rank alike, what the first rank that failed
                raised. Errors of other types travel as RuntimeError.
        """
        mine = _attempt(work)
        if self.group is None:
            return _unwrap(mine if mine[1] is not None else _attempt(lambda: decide([mine[0]])))
        root = dist.get_global_rank(self.group, 0)
        gathered: list[Any] | None = [None] * self.world if self.is_main else None
        dist.gather_object(mine, gathered, dst=root, group=self.group)
        answer: list[Any] = [None]
        if gathered is not None:
            failure = next((error for _, error in gathered if error is not None), None)
            values = [value for value, _ in gathered]
            answer[0] = (None, failure) if failure else _attempt(lambda: decide(values))
        dist.broadcast_object_list(answer, src=root, group=self.group)
        return _unwrap(answer[0])

    def share(self, value: Callable[[], T]) -> T:
        """What rank 0 gets from `value`, on every rank; the others do not call it."""
        return self.agree(lambda: None, lambda _: value())


ALONE = Peers(None)


def default_peers() -> Peers:
    """All ranks over the default group; a single process where there is none."""
    return Peers(dist.group.WORLD) if dist.is_initialized() else ALONE


def first_cause(error: BaseException) -> BaseException:
    """What one rank raised first, where `error` is a report about several of them."""
    while isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    return error


def _attempt(work: Callable[[], Any]) -> tuple[Any, tuple[Any, ...] | None]:
    """(result, None), or (None, a description of the error)."""
    try:
        return work(), None
    except UserError as error:
        return None, ("user", error.what, error.rule, error.fix)
    except OSError as error:
        return None, ("system", error.errno, error.strerror or str(error), error.filename)
    except (Exception, CheckpointException) as error:
        cause = first_cause(error)
        return None, ("other", f"{type(cause).__name__}: {cause}")


def _unwrap(answer: tuple[Any, tuple[Any, ...] | None]) -> Any:
    result, failure = answer
    match failure:
        case None:
            return result
        case ("user", what, rule, fix):
            raise UserError(what, rule, fix)
        case ("system", number, text, name):
            raise OSError(number, text, name)
        case (_, text):
            raise RuntimeError(text)

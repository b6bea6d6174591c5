"""Which rank this process is.

A launcher is known by the variables it sets. Adding one is one function in `_LAUNCHERS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ringattn.errors import UserError

LOCAL_LAUNCHER = "ringattn"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        rank, world: place among all processes.
        local_rank, local_world: place among those of this host.
        launcher: who started the process; `LOCAL_LAUNCHER` is a single process of its own.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = LOCAL_LAUNCHER


def discover_ranks(environ: Mapping[str, str]) -> Ranks | None:
    """The place that a launcher's variables give this process; None without a launcher.

    Raises:
        UserError: the variables are incomplete or no numbers.
    """
    for find in _LAUNCHERS:
        if (ranks := find(environ)) is not None:
            return ranks
    return None


def _torchrun(environ: Mapping[str, str]) -> Ranks | None:
    """torchrun and everything that speaks its convention: RANK and WORLD_SIZE."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    world = _integer(environ, "WORLD_SIZE", least=1)
    rank = _integer(environ, "RANK", least=0)
    if rank >= world:
        raise UserError(
            f"RANK={rank}", f"must be below WORLD_SIZE={world}", "unset both, or use torchrun"
        )
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in environ:
            raise UserError(
                f"RANK={rank}", f"needs {key} beside it", "unset RANK, or start with torchrun"
            )
    # Without LOCAL_* every rank is taken to be on this host.
    local_rank = _integer(environ, "LOCAL_RANK", least=0, default=rank)
    local_world = _integer(environ, "LOCAL_WORLD_SIZE", least=1, default=world)
    return Ranks(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        launcher="torchrun",
    )


_LAUNCHERS: tuple[Callable[[Mapping[str, str]], Ranks | None], ...] = (_torchrun,)


def _integer(
    environ: Mapping[str, str], key: str, *, least: int, default: int | None = None
) -> int:
    text = environ.get(key)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{key}={text}", f"must be an integer of at least {least}", "start with torchrun"
        )
    return int(text)

"""A process's place in the job."""

from collections.abc import Mapping
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
        node: number that the launcher gives this host; None where it gives none.
        placed: whether the launcher said local_rank and local_world; else they are guesses until
            ranks have compared their hosts.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = LOCAL_LAUNCHER
    node: int | None = None
    placed: bool = True


@dataclass(frozen=True)
class Joined:
    """What a launcher says.

    Attributes:
        ranks: this process's place.
        master: address and port at which the ranks meet, where torchrun's variables do not say.
    """

    ranks: Ranks
    master: tuple[str, int] | None = None


def integer(
    environ: Mapping[str, str],
    key: str,
    *,
    least: int,
    default: int | None = None,
    fix: str = "start with torchrun",
) -> int:
    """The number in a launcher's variable.

    Raises:
        UserError: it is missing and has no default, or is no integer of at least `least`.
    """
    text = environ.get(key)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(key, "is not set, beside other variables of a launcher", fix)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{key}={text}", f"must be an integer of at least {least}", fix)
    return int(text)

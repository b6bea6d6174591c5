"""Which rank this process is: what its launcher says, whichever launcher it is.

A launcher is known by the variables it sets. Adding one is one function that returns `Joined`, and
its name in `LAUNCHERS` and `_FINDERS`.
"""

from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Literal

from ringattn.errors import UserError
from ringattn.launch.failure import ToldElsewhereError
from ringattn.launch.mpi import join_mpi
from ringattn.launch.ranks import Joined, Ranks, integer
from ringattn.launch.slurm import in_step, join_slurm

Launcher = Literal["auto", "torchrun", "mpi", "slurm", "deepspeed", "none"]
LAUNCHERS: tuple[Launcher, ...] = ("auto", "torchrun", "mpi", "slurm", "deepspeed", "none")

# By which variables launchers tell a process its rank, the number of ranks, and its local rank.
_RANKS = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
_RANKS += (("PMI_RANK", "PMI_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
_LOCAL = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def discover_ranks_once(
    environ: MutableMapping[str, str], launcher: Launcher = "auto"
) -> Ranks | None:
    """`discover_ranks`, where of a mistake that all processes find only one of each host tells.

    Raises:
        UserError: this process is to tell of the mistake.
        ToldElsewhereError: another one does.
    """
    try:
        return discover_ranks(environ, launcher)
    except UserError as error:
        if _own(error) or _first_of_host(environ):
            raise
        raise ToldElsewhereError from None


def discover_ranks(environ: MutableMapping[str, str], launcher: Launcher = "auto") -> Ranks | None:
    """The place that a launcher gives this process; None without a launcher.

    In this order: RANK and WORLD_SIZE (torchrun, DeepSpeed); MPI; a SLURM step of several tasks.
    Under MPI every process of the job calls it together, and `environ` gets the variables that
    torchrun would have set, for the libraries that read them; under SLURM likewise.

    Args:
        environ: variables of this process.
        launcher: "auto", or whose variables are read whatever else is set; "none" for none, which
            is refused where a launcher has started several processes.

    Raises:
        UserError: variables are missing, contradict each other, or are no numbers.
    """
    joined = None
    if launcher == "auto":
        # One after the other: asking MPI means to start it.
        found = (joined for find in _AUTO if (joined := find(environ)) is not None)
        joined = next(found, None)
    elif launcher == "none":
        _refuse_several(environ)
    else:
        joined = _FINDERS[launcher](environ)
        if joined is None:
            raise UserError(
                f"--launcher {launcher}",
                "did not start this process: none of its variables is set",
                "use --launcher auto, or none for local ranks",
            )
    if joined is None:
        return None
    if joined.master is not None:
        export_ranks(environ, joined.ranks)
        environ["MASTER_ADDR"], environ["MASTER_PORT"] = joined.master[0], str(joined.master[1])
    return joined.ranks


def export_ranks(environ: MutableMapping[str, str], ranks: Ranks) -> None:
    """Sets the variables by which torchrun tells a process its place."""
    environ["RANK"], environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    environ["LOCAL_WORLD_SIZE"] = str(ranks.local_world)


def _torchrun(environ: Mapping[str, str]) -> Joined:
    """torchrun, and everything that speaks its convention."""
    world, rank = integer(environ, "WORLD_SIZE", least=1), integer(environ, "RANK", least=0)
    _below("RANK", rank, "WORLD_SIZE", world)
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in environ:
            raise UserError(
                key, "is not set beside RANK and WORLD_SIZE", "unset them, or start with torchrun"
            )
    # Without LOCAL_* every rank is taken to be on this host, until ranks can compare their hosts.
    local_rank = integer(environ, "LOCAL_RANK", least=0, default=rank)
    local_world = integer(environ, "LOCAL_WORLD_SIZE", least=1, default=world)
    placed = "LOCAL_RANK" in environ and "LOCAL_WORLD_SIZE" in environ
    if placed:
        _below("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world)
    ranks = Ranks(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        launcher="torchrun",
        placed=placed,
    )
    return Joined(ranks)


def _deepspeed(environ: Mapping[str, str]) -> Joined:
    """DeepSpeed's launcher: torchrun's variables, but LOCAL_SIZE, and CROSS_RANK for the node.

    Its LOCAL_RANK counts from a wrong start where nodes are uneven: hosts are compared instead.
    """
    renamed = dict(environ)
    if "LOCAL_SIZE" in environ:
        renamed.setdefault("LOCAL_WORLD_SIZE", environ["LOCAL_SIZE"])
    ranks = _torchrun(renamed).ranks
    return Joined(
        Ranks(
            rank=ranks.rank,
            world=ranks.world,
            local_rank=ranks.local_rank,
            local_world=ranks.local_world,
            launcher="deepspeed",
            node=integer(environ, "CROSS_RANK", least=0, default=0),
            placed=False,
        )
    )


def _if_told(
    find: Callable[[Mapping[str, str]], Joined], environ: Mapping[str, str]
) -> Joined | None:
    """The place by torchrun's variables; None where neither rank nor world is set."""
    return find(environ) if "RANK" in environ or "WORLD_SIZE" in environ else None


def _variables(environ: Mapping[str, str]) -> Joined | None:
    """Whoever set RANK and WORLD_SIZE."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    return _deepspeed(environ) if "CROSS_RANK" in environ else _torchrun(environ)


def _mpi_or_its_step(environ: Mapping[str, str]) -> Joined | None:
    """MPI; the SLURM step where srun set MPI's variables, and MPI cannot be used.

    srun sets them for any program where its MPI plugin is on.
    """
    try:
        return join_mpi(environ)
    except UserError:
        step = join_slurm(environ)
        own = environ.get("PMI_RANK", environ.get("PMIX_RANK"))
        if step is None or own != environ["SLURM_PROCID"]:
            raise
        return step


def _refuse_several(environ: Mapping[str, str]) -> None:
    """Refuses to start local ranks in each of the processes that a launcher started.

    A shell that srun opened for a person (--pty) is one process, however many tasks the step has.
    """
    several = in_step(environ) and "SLURM_PTY_PORT" not in environ
    for rank_key, world_key in _RANKS if several else _RANKS[:-1]:
        world = environ.get(world_key, "")
        if rank_key in environ and world.isdecimal() and int(world) > 1:
            raise UserError(
                "--launcher none",
                f"a launcher has started {world} processes ({world_key}), and each would start a "
                "job of its own",
                f"leave --launcher out, or unset {rank_key} and {world_key} for local ranks",
            )


def _own(error: UserError) -> bool:
    """Whether a mistake may be this process's alone: a value of which each has its own."""
    key = error.what.partition("=")[0]
    return "=" in error.what and key in (*_LOCAL, *(key for key, _ in _RANKS), "SLURM_NODEID")


def _first_of_host(environ: Mapping[str, str]) -> bool:
    """Whether no variable tells that this host has processes before this one."""
    said = [environ[key] for key in _LOCAL if key in environ]
    said = said or [environ[key] for key, _ in _RANKS if key in environ]
    return not any(text.isdecimal() and int(text) for text in said)


def _below(key: str, value: int, limit_key: str, limit: int) -> None:
    if value >= limit:
        raise UserError(
            f"{key}={value}",
            f"must be below {limit_key}={limit}",
            "unset both, or start with torchrun",
        )


_AUTO: tuple[Callable[[Mapping[str, str]], Joined | None], ...] = (
    _variables,
    _mpi_or_its_step,
    join_slurm,
)
_FINDERS: Mapping[str, Callable[[Mapping[str, str]], Joined | None]] = {
    "torchrun": partial(_if_told, _torchrun),
    "deepspeed": partial(_if_told, _deepspeed),
    "mpi": partial(join_mpi, certain=True),
    "slurm": partial(join_slurm, certain=True),
}

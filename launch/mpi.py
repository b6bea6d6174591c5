"""A process's place among those of an MPI job, through mpi4py."""

import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ringattn.errors import UserError
from ringattn.launch.ranks import Joined, Ranks, integer
from ringattn.parallel.host import host_key
from ringattn.parallel.network import is_loopback, source_address

if TYPE_CHECKING:
    from types import ModuleType

# Rank and size as Open MPI and as MPICH, Intel MPI and others that speak PMI tell them. PMIx tells
# the rank alone.
_VARIABLES = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
_PMIX_RANK = "PMIX_RANK"


def join_mpi(environ: Mapping[str, str], *, certain: bool = False) -> Joined | None:
    """This process's place among the processes of its MPI job, all of which call it together.

    Rank 0 picks the address and the port at which the job meets, and broadcasts them; MASTER_ADDR
    and MASTER_PORT of its environment go first. Ranks are numbered node by node, however mpiexec
    dealt them out, because neighbouring ranks are taken to share a node.

    Args:
        environ: variables of this process.
        certain: MPI is started even where no variable tells of it.

    Returns:
        None where no variable of an MPI launcher is set, and MPI knows of no other process.

    Raises:
        UserError: incomplete variables, no mpi4py, or an mpi4py of another MPI than the launcher.
    """
    expected = _told_size(environ)
    if expected is None and not certain:
        return None
    MPI = _load()
    world = MPI.COMM_WORLD
    if expected is None and world.size == 1:
        return None
    if expected and world.size != expected:
        raise UserError(
            f"MPI world of size {world.size}",
            f"mpiexec started {expected}: mpi4py is built against another MPI than mpiexec's",
            "use the mpiexec of that MPI, or install mpi4py for this one",
        )
    return _join(MPI, environ)


def leave_mpi() -> None:
    """Leaves the MPI job, if this process joined one. Every process calls it, after a success.

    A process that ends without it is taken for a failure by mpiexec, which then ends the others.
    That is why mpi4py must not do it on its own.
    """
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()


def _told_size(environ: Mapping[str, str]) -> int | None:
    """Ranks of the job by the launcher's variables, 0 where only PMIx tells of it; None outside."""
    for rank_key, size_key in _VARIABLES:
        if rank_key in environ or size_key in environ:
            fix = f"start with mpiexec, or unset {rank_key} and {size_key} for local ranks"
            size = integer(environ, size_key, least=1, fix=fix)
            rank = integer(environ, rank_key, least=0, fix=fix)
            if rank >= size:
                raise UserError(f"{rank_key}={rank}", f"must be below {size_key}={size}", fix)
            return size
    # srun sets it too, where SLURM's own variables say more.
    return 0 if _PMIX_RANK in environ and "SLURM_STEP_ID" not in environ else None


def _load() -> "ModuleType":
    """mpi4py's MPI, started."""
    try:
        import mpi4py
    except ImportError:
        raise UserError(
            "started by mpiexec",
            "needs the package mpi4py",
            "pip install 'ringattn[mpi]', or start with torchrun",
        ) from None
    mpi4py.rc.finalize = False  # see leave_mpi
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "mpi4py",
            f"finds no MPI library ({str(error).splitlines()[0]})",
            "load the MPI whose mpiexec started this, or install mpi4py for it",
        ) from None
    return MPI


def _join(MPI: Any, environ: Mapping[str, str]) -> Joined:
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    # A number that the ranks of a node share; by host too, because containers may share memory.
    leader = node.bcast(world.rank, root=0)
    node.Free()
    homes = world.allgather((leader, host_key()))
    rank, local_rank, local_world = number_by_node(homes, world.rank)
    master, mistake = None, None
    if world.rank == 0:
        try:
            master = _meeting_point(environ, alone=len(set(homes)) == 1)
        except UserError as error:
            mistake = (error.what, error.rule, error.fix)
    master, mistake = world.bcast((master, mistake), root=0)
    if mistake is not None:
        raise UserError(*mistake)
    ranks = Ranks(
        rank=rank,
        world=world.size,
        local_rank=local_rank,
        local_world=local_world,
        launcher="mpi",
    )
    return Joined(ranks, master=master)


def number_by_node(homes: list[tuple[int, str]], rank: int) -> tuple[int, int, int]:
    """Numbers ranks so that those of a node are consecutive; rank 0 stays rank 0.

    Args:
        homes: per rank, what the ranks of its node share.
        rank: of this process.

    Returns:
        Its new rank, its place on its node, and how many ranks that node has.
    """
    first = {home: number for number, home in reversed(list(enumerate(homes)))}
    order = sorted(range(len(homes)), key=lambda one: (first[homes[one]], one))
    mates = [one for one in order if homes[one] == homes[rank]]
    return order.index(rank), mates.index(rank), len(mates)


def _meeting_point(environ: Mapping[str, str], *, alone: bool) -> tuple[str, int]:
    """Address and port of rank 0; on loopback where all ranks are on its host."""
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else _own_address())
    if "MASTER_PORT" in environ:
        return address, integer(environ, "MASTER_PORT", least=1)
    both = socket.has_dualstack_ipv6()  # the store will listen on both, too
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as listener:
        return address, listener.getsockname()[1]


def _own_address() -> str:
    """This host's address for other hosts: that of its name, else of the route to far ones."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not is_loopback(address):
        return address
    found = source_address()
    if found is None or is_loopback(found):
        raise UserError(
            f"host {socket.gethostname()}",
            "has no address that other hosts could reach",
            "set MASTER_ADDR to rank 0's address",
        )
    return found

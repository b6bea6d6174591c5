"""A process's place in a SLURM step, from the variables that srun sets."""

import re
from collections.abc import Mapping
from itertools import product

from ringattn.errors import UserError
from ringattn.launch.ranks import Joined, Ranks, integer

_FIX = "start with srun, or unset SLURM_STEP_ID for local ranks"
_SPECIAL_STEPS = 0xFFFFFFF0  # batch, extern and interactive steps have numbers from here on
_FIRST_PORT, _PORTS = 20_000, 10_000  # below the ports that Linux hands out by itself


def join_slurm(environ: Mapping[str, str], *, certain: bool = False) -> Joined | None:
    """This process's place among the tasks of its step; None outside of a step of several tasks.

    A shell of an allocation has SLURM_NTASKS, but no step of its own. Ranks are numbered node by
    node, whatever ``--distribution`` says, because neighbouring ranks are taken to share a node.

    Args:
        environ: variables of this process.
        certain: a single task counts too.

    Raises:
        UserError: variables are missing or contradict each other.
    """
    if not in_step(environ):
        return None
    key = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if key not in environ and not certain:
        return None
    world = integer(environ, key, least=1, fix=_FIX)
    if world == 1 and not certain:
        return None
    task = integer(environ, "SLURM_PROCID", least=0, fix=_FIX)
    if task >= world:
        raise UserError(f"SLURM_PROCID={task}", f"must be below {key}={world}", _FIX)
    counts = _tasks_of_nodes(environ, world)
    ranks = _place(environ, task, world, counts)
    return Joined(ranks, master=(_address(environ, len(counts)), _port(environ)))


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process, or what started it."""
    step = environ.get("SLURM_STEP_ID")
    return step is not None and not (step.isdecimal() and int(step) >= _SPECIAL_STEPS)


def expand_nodes(text: str) -> list[str]:
    """The nodes of a list such as ``gpu[01-03,7],x``, in order.

    Raises:
        UserError: brackets that do not close, or ranges that are none.
    """
    wrong = UserError(f"node list {text}", "must be like gpu[01-03,7],x", _FIX)
    if not re.fullmatch(r"([^\[\],]|\[[^\[\]]+\]|,(?=[^,]))+", text):
        raise wrong
    names: list[str] = []
    for entry in re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", text):
        parts = [part for part in re.split(r"(\[[^\]]*\])", entry) if part]
        choices = [_numbers(part[1:-1]) if part[0] == "[" else [part] for part in parts]
        if not all(choices):
            raise wrong
        names += ["".join(chosen) for chosen in product(*choices)]
    return names


def _numbers(text: str) -> list[str]:
    """Numbers of a list such as 01-03,7, with their leading zeros; none for a malformed one."""
    found: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(first) > int(last):
            return []
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def expand_counts(text: str) -> list[int]:
    """Tasks of each node from a list such as ``4(x2),3``.

    Raises:
        UserError: it is no such list.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text}", "must be like 4(x2),3", _FIX)
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _tasks_of_nodes(environ: Mapping[str, str], world: int) -> list[int]:
    """Tasks of each node of the step; none where srun does not say."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None:
        return []
    counts = expand_counts(text)
    if sum(counts) != world:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={text}", f"must add up to the step's {world} tasks", _FIX
        )
    return counts


def _place(environ: Mapping[str, str], task: int, world: int, counts: list[int]) -> Ranks:
    if not counts:
        local = integer(environ, "SLURM_LOCALID", least=0, default=task, fix=_FIX)
        return Ranks(
            rank=task,
            world=world,
            local_rank=local,
            local_world=world,
            launcher="slurm",
            node=integer(environ, "SLURM_NODEID", least=0, default=0, fix=_FIX),
            placed=False,
        )
    node = integer(environ, "SLURM_NODEID", least=0, default=0 if len(counts) == 1 else None)
    local = integer(environ, "SLURM_LOCALID", least=0, fix=_FIX)
    if node >= len(counts) or local >= counts[node]:
        raise UserError(
            f"SLURM_NODEID={node}, SLURM_LOCALID={local}",
            f"contradicts SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']}",
            _FIX,
        )
    return Ranks(
        rank=sum(counts[:node]) + local,
        world=world,
        local_rank=local,
        local_world=counts[node],
        launcher="slurm",
    )


def _address(environ: Mapping[str, str], nodes: int) -> str:
    """Where rank 0 is: MASTER_ADDR where it is set, else the step's first node."""
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if nodes == 1:
        return "127.0.0.1"
    listed = environ.get("SLURM_STEP_NODELIST")
    if listed is not None:
        return expand_nodes(listed)[0]
    # Where srun was called, which is the first node of a batch job.
    address = environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if address is None:
        raise UserError("SLURM_STEP_NODELIST", "is not set", "set MASTER_ADDR to rank 0's host")
    return address


def _port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT where it is set, else one that other jobs and steps are unlikely to take."""
    if "MASTER_PORT" in environ:
        return integer(environ, "MASTER_PORT", least=1)
    job = integer(environ, "SLURM_JOB_ID", least=0, fix=_FIX)
    step = integer(environ, "SLURM_STEP_ID", least=0, fix=_FIX)
    return _FIRST_PORT + (job + 2503 * step) % _PORTS

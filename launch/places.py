"""Where every rank of a job lies: hosts compared, GPUs dealt out.

The launcher's variables come first; what they leave open, or what cannot be as they say, is found
by comparing hosts. Rank 0 hears every rank once and answers each once, through the job's store.
"""

import json
import socket
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.ranks import Ranks
from ringattn.parallel.cores import format_cpus, parse_cpus
from ringattn.parallel.host import host_key, nvlink_sets, usable_cpus, visible_gpus
from ringattn.parallel.topology import Topology, fast_domains

_SAID, _ANSWER, _TOPOLOGY = "ringattn/place/", "ringattn/placed/", "ringattn/topology"


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a rank has on its host.

    Attributes:
        local_rank, local_world: place among the ranks of this node.
        gpu: number of its GPU among those it sees; None where it sees none.
        gpu_sharers: ranks of the node that see the same GPUs.
        crowded: somewhere in the job, two ranks have one GPU.
        core_place, core_sharers: place among the ranks of the node that may use the same CPUs.
    """

    local_rank: int = 0
    local_world: int = 1
    gpu: int | None = None
    gpu_sharers: int = 1
    crowded: bool = False
    core_place: int = 0
    core_sharers: int = 1


@dataclass(frozen=True)
class Said:
    """What a rank tells rank 0 of itself.

    Attributes:
        host: equal for ranks of one host. name: for people.
        node: the launcher's number of the host, or None.
        local: (local rank, local world) where the launcher says them.
        gpus: what identifies the GPUs it sees. links: per GPU, what those that NVLink joins share.
        cpus: list of the CPUs it may use.
    """

    host: str
    name: str
    node: int | None
    local: tuple[int, int] | None
    gpus: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    cpus: str = ""


def find_places(ranks: Ranks, store: dist.Store, *, gpus: bool) -> tuple[Ranks, Place, Topology]:
    """This rank's place on its host, and the topology of the job. Every rank calls it together.

    Args:
        ranks: the launcher's word.
        store: shared by the job's ranks.
        gpus: GPUs are used.

    Returns:
        `ranks` with the local rank as found, and the rest.

    Raises:
        UserError: on every rank alike, where ranks of a node are not consecutive, variables of
            ranks contradict each other, or some ranks see GPUs and others none.
    """
    said = _look(ranks, gpus=gpus)
    if ranks.world == 1:
        (place,), topology = settle([said])
        return ranks, place, topology
    store.set(f"{_SAID}{ranks.rank}", json.dumps(asdict(said)))
    if ranks.rank == 0:
        heard = store.multi_get([f"{_SAID}{rank}" for rank in range(ranks.world)])
        _answer(store, [_read(text) for text in heard])
    about, mine = store.multi_get([_TOPOLOGY, f"{_ANSWER}{ranks.rank}"])
    found = json.loads(about)
    if "mistake" in found:
        raise UserError(*found["mistake"])
    place = Place(**json.loads(mine))
    topology = Topology(**{name: tuple(value) for name, value in found.items()})
    local = replace(ranks, local_rank=place.local_rank, local_world=place.local_world)
    return local, place, topology


def _look(ranks: Ranks, *, gpus: bool) -> Said:
    seen = [gpu.uuid for gpu in visible_gpus()] if gpus else []
    links = {i: seen[group[0]] for group in nvlink_sets(seen) for i in group}
    return Said(
        host=host_key(),
        name=socket.gethostname(),
        node=ranks.node,
        local=(ranks.local_rank, ranks.local_world) if ranks.placed else None,
        gpus=tuple(seen),
        links=tuple(links.get(i, "") for i in range(len(seen))),
        cpus=format_cpus(usable_cpus()),
    )


def _read(text: bytes) -> Said:
    values: dict[str, Any] = json.loads(text)
    for name in ("local", "gpus", "links"):
        values[name] = None if values[name] is None else tuple(values[name])
    return Said(**values)


def _answer(store: dist.Store, said: list[Said]) -> None:
    """Tells every rank its place, or all of them the mistake."""
    try:
        places, topology = settle(said)
    except UserError as error:
        for rank in range(len(said)):
            store.set(f"{_ANSWER}{rank}", "{}")
        store.set(_TOPOLOGY, json.dumps({"mistake": [error.what, error.rule, error.fix]}))
        return
    for rank, place in enumerate(places):
        store.set(f"{_ANSWER}{rank}", json.dumps(asdict(place)))
    store.set(_TOPOLOGY, json.dumps(asdict(topology)))


def settle(said: list[Said]) -> tuple[list[Place], Topology]:
    """Places of all ranks and the topology, from what each says. Host work.

    Raises:
        UserError: as `find_places`.
    """
    nodes = _nodes(said)
    _check_gpus(said)
    dealt = [_deal(members, said) for members in nodes]
    # GPUs of all nodes together: two launchers may have started ranks on one host.
    taken = [
        said[rank].gpus[gpu] for node in dealt for rank, gpu in node.items() if gpu is not None
    ]
    crowded = len(set(taken)) < len(taken)
    places, links = [], []
    for members, gpus in zip(nodes, dealt, strict=True):
        # A set of CPUs that ranks of the node have in common: its name, its ranks.
        cpus = [parse_cpus(said[rank].cpus) for rank in members]
        for local, rank in enumerate(members):
            mates = [i for i, other in enumerate(cpus) if other & cpus[local]]
            places.append(
                Place(
                    local_rank=local,
                    local_world=len(members),
                    gpu=gpus[rank],
                    gpu_sharers=sum(said[one].gpus == said[rank].gpus for one in members),
                    crowded=crowded,
                    core_place=mates.index(local) if local in mates else 0,
                    core_sharers=max(len(mates), 1),
                )
            )
        links.append([_link(said[rank], gpus[rank]) for rank in members])
    topology = Topology(
        nodes=tuple(len(members) for members in nodes),
        hosts=tuple(said[members[0]].name for members in nodes),
        domains=fast_domains(links),
    )
    return places, topology


def _nodes(said: list[Said]) -> list[range]:
    """The ranks of each node."""
    homes = []
    for rank, one in enumerate(said):
        # Two launchers on one host are two nodes: what they start differs in where it begins.
        node = f"from rank {rank - one.local[0]}" if one.local else f"number {one.node}"
        homes.append((one.host, node))
    nodes, at = [], 0
    while at < len(said):
        count = Counter(homes)[homes[at]]
        members = range(at, at + count)
        strange = next((r for r in members if r >= len(said) or homes[r] != homes[at]), None)
        if strange is not None:
            raise UserError(
                f"rank {at} on host {said[at].name}",
                f"the {count} ranks of its node are not consecutive: {_list(homes, homes[at])}",
                "number the ranks node by node, as torchrun does",
            )
        for local, rank in enumerate(members):
            told = said[rank].local
            if told not in (None, (local, count)):
                raise UserError(
                    f"LOCAL_RANK={told[0]}, LOCAL_WORLD_SIZE={told[1]} of rank {rank}",
                    f"host {said[rank].name} has the ranks {members.start} to {members.stop - 1}"
                    f" of its node, which makes it {local} of {count}",
                    "correct the launcher's variables, or leave out LOCAL_*",
                )
        nodes.append(members)
        at += count
    return nodes


def _list(homes: list[tuple[str, str]], home: tuple[str, str]) -> str:
    found = [str(rank) for rank, one in enumerate(homes) if one == home]
    return ", ".join(found if len(found) <= 8 else [*found[:8], "…"])


def _check_gpus(said: list[Said]) -> None:
    """Either all ranks see GPUs or none does."""
    without = [rank for rank, one in enumerate(said) if not one.gpus]
    if without and len(without) < len(said):
        some = next(rank for rank, one in enumerate(said) if one.gpus)
        raise UserError(
            f"rank {without[0]} on host {said[without[0]].name}",
            f"sees no GPU, and rank {some} on host {said[some].name} does",
            "give every rank a GPU, or set run.device=cpu",
        )


def _deal(members: range, said: list[Said]) -> dict[int, int | None]:
    """Per rank of a node the number of its GPU among those it sees.

    Ranks that see the same GPUs take them in turn: all GPUs of the node, or the ones that the
    launcher made visible to one task.
    """
    dealt: dict[int, int | None] = {}
    before: Counter[tuple[str, ...]] = Counter()
    for rank in members:
        seen = said[rank].gpus
        dealt[rank] = before[seen] % len(seen) if seen else None
        before[seen] += 1
    return dealt


def _link(one: Said, gpu: int | None) -> str:
    return one.links[gpu] if gpu is not None and gpu < len(one.links) else ""

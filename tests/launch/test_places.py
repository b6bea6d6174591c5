"""Where ranks lie: hosts compared, GPUs dealt, cores and interfaces chosen."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch import places, session
from ringattn.launch.binding import choose_cores, choose_interface, on_cores, use_interface
from ringattn.launch.config_load import config_from_values
from ringattn.launch.places import Place, Said, find_places, settle
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import open_session, threads_per_rank
from ringattn.parallel.cores import NumaNode
from ringattn.parallel.network import Interface, network_interfaces
from ringattn.parallel.topology import Topology
from tests.ranks import run_ranks


def said(host: str, local: tuple[int, int] | None = None, **values: Any) -> Said:
    return Said(host=host, name=host, node=None, local=local, **values)


def test_hosts_decide_where_the_launcher_says_nothing() -> None:
    found, topology = settle([said("a"), said("a"), said("a"), said("b")])
    assert [(p.local_rank, p.local_world) for p in found] == [(0, 3), (1, 3), (2, 3), (0, 1)]
    assert topology == Topology(nodes=(3, 1), hosts=("a", "b"), domains=(3, 1))
    assert not topology.even
    assert [topology.host_of(rank) for rank in range(4)] == ["a", "a", "a", "b"]


def test_two_launchers_on_one_host_are_two_nodes() -> None:
    _, topology = settle([said("a", (i % 2, 2)) for i in range(4)])
    assert topology.nodes == (2, 2)


MISTAKES = {
    "ranks dealt to hosts in turn": (
        [said("a"), said("b"), said("a"), said("b")], "not consecutive: 0, 2"
    ),
    "one node on two hosts": (
        [said("a", (0, 2)), said("b", (1, 2))], "LOCAL_RANK=0, LOCAL_WORLD_SIZE=2 of rank 0"
    ),
    "local ranks that overlap": (
        [said("a", (0, 2)), said("a", (0, 2))], "which makes it 0 of 1"
    ),
    "a host without GPUs": (
        [said("a", gpus=("x",)), said("b")], "rank 1 on host b: sees no GPU"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    heard, words = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        settle(heard)
    assert words in str(caught.value)


def gpus_of(heard: list[Said]) -> list[tuple[int | None, int, bool]]:
    return [(place.gpu, place.gpu_sharers, place.crowded) for place in settle(heard)[0]]


def test_ranks_that_see_all_gpus_take_them_in_turn() -> None:
    both = ("x", "y")
    assert gpus_of([said("a", gpus=both)] * 2) == [(0, 2, False), (1, 2, False)]
    assert gpus_of([said("a", gpus=both)] * 3) == [(0, 3, True), (1, 3, True), (0, 3, True)]


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    """srun --gpus-per-task: local rank 3 of 4 has cuda:0, and nobody shares it."""
    heard = [said("a", (i, 4), gpus=(f"gpu{i}",)) for i in range(4)]
    assert gpus_of(heard) == [(0, 1, False)] * 4


def test_gpus_of_groups_of_tasks() -> None:
    heard = [said("a", gpus=seen) for seen in [("w", "x")] * 2 + [("y", "z")] * 2]
    assert [gpu for gpu, _, _ in gpus_of(heard)] == [0, 1, 0, 1]


def test_a_crowded_node_is_known_to_all() -> None:
    """All ranks take one back end."""
    heard = [said("a", gpus=("x",)), said("b", gpus=("y",)), said("b", gpus=("y",))]
    assert [crowded for _, _, crowded in gpus_of(heard)] == [True] * 3
    # Also by another launcher on the same host.
    heard = [said("a", (0, 1), gpus=("x",)), said("a", (0, 1), gpus=("x",))]
    assert [crowded for _, _, crowded in gpus_of(heard)] == [True] * 2


def test_nvlink_pairs_are_domains() -> None:
    seen = ("w", "x", "y", "z")
    pairs = [said("a", gpus=seen, links=("w", "w", "y", "y"))] * 4
    assert settle(pairs)[1].domains == (2, 2)
    crossed = [said("a", gpus=seen, links=("w", "x", "w", "x"))] * 4
    assert settle(crossed)[1].domains == (4,)
    none = [said("a", gpus=seen, links=seen)] * 4
    assert settle(none)[1].domains == (4,)


def test_ranks_that_the_launcher_bound_share_no_cores() -> None:
    bound, _ = settle([said("a", cpus="0-3"), said("a", cpus="4-7")])
    assert [place.core_sharers for place in bound] == [1, 1]
    free, _ = settle([said("a", cpus="0-7"), said("a", cpus="0-7"), said("b", cpus="0-7")])
    assert [(p.core_place, p.core_sharers) for p in free] == [(0, 2), (1, 2), (0, 1)]
    config = config_from_values({})
    usable = len(os.sched_getaffinity(0))
    assert threads_per_rank(config, 1) == usable
    assert threads_per_rank(config, 2 * usable) == 1


def _find(rank: int, world: int, _group: Any, sizes: list[int], local: bool) -> Any:
    """As if the ranks lay on hosts of `sizes` ranks."""
    hosts = [host for host, size in enumerate(sizes) for _ in range(size)]
    first = hosts.index(hosts[rank])
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world, placed=False)
    if local:
        ranks = replace(ranks, local_rank=rank - first, local_world=sizes[hosts[rank]], placed=True)
    store = dist.PrefixStore(f"{sizes} {local}", dist.distributed_c10d._get_default_store())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "host_key", lambda: f"host{hosts[rank]}")
        try:
            found, place, topology = find_places(ranks, store, gpus=False)
        except UserError as error:
            return str(error)
    assert (found.local_rank, found.local_world) == (place.local_rank, place.local_world)
    return place.local_rank, place.local_world, topology.nodes


@pytest.mark.parametrize("local", [False, True])
def test_ranks_compare_hosts_through_the_store(local: bool) -> None:
    assert run_ranks(3, _find, [2, 1], local) == [
        (0, 2, (2, 1)), (1, 2, (2, 1)), (0, 1, (2, 1)),
    ]  # fmt: skip


def test_every_rank_hears_of_the_mistake() -> None:
    found = run_ranks(3, _find_in_turn)
    assert len(set(found)) == 1
    assert "are not consecutive" in found[0]


def _find_in_turn(rank: int, world: int, _group: Any) -> Any:
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world, placed=False)
    store = dist.PrefixStore("in turn", dist.distributed_c10d._get_default_store())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "host_key", lambda: f"host{rank % 2}")
        with pytest.raises(UserError) as caught:
            find_places(ranks, store, gpus=False)
    return str(caught.value)


def test_a_session_takes_the_gpu_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one visible GPU, local rank 3 has cuda:0 and NCCL, not a share of a GPU and gloo."""
    place = Place(local_rank=3, local_world=4, gpu=0, gpu_sharers=1)
    ranks = Ranks(rank=3, world=4, local_rank=3, local_world=4, launcher="slurm")
    opened: dict[str, Any] = {}
    topology = Topology((4,))
    monkeypatch.setattr(session, "find_places", lambda *_, gpus: (ranks, place, topology))
    monkeypatch.setattr(session.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(session.torch.cuda, "set_device", lambda device: opened.update(at=device))
    monkeypatch.setattr(session, "visible_gpus", lambda: [type("Gpu", (), {"numa": None})])
    monkeypatch.setattr(
        session.dist, "init_process_group", lambda backend, **_: opened.update(backend=backend)
    )
    monkeypatch.setattr(session.dist, "destroy_process_group", lambda: None)
    config = config_from_values({"run.device": "cuda"})
    with open_session(config, ranks, dist.HashStore()) as found:
        assert str(found.device) == "cuda:0"
        assert not found.shared
        assert found.sharers == 1
    assert str(opened["at"]) == "cuda:0"
    assert opened["backend"] == "cpu:gloo,cuda:nccl"


def numa(*cores: tuple[int, ...]) -> NumaNode:
    return NumaNode(0, tuple(frozenset(core) for core in cores))


ONE = (numa((0, 4), (1, 5), (2, 6), (3, 7)),)
TWO = (numa((0, 8), (1, 9), (2,), (3,)), replace(numa((4,), (5,), (6,), (7,)), number=1))
ALL_OF_TWO = frozenset(range(10))


def test_cores_of_a_rank() -> None:
    place = Place(local_rank=1, local_world=2, core_place=1, core_sharers=2)
    # Whole cores: both hardware threads of each.
    assert choose_cores(place, ONE, frozenset(range(8)), None) == {2, 3, 6, 7}
    assert choose_cores(place, TWO, ALL_OF_TWO, None) == {4, 5, 6, 7}
    # The node of the GPU, as a whole.
    assert choose_cores(place, TWO, ALL_OF_TWO, 0) == {0, 1, 2, 3, 8, 9}
    assert choose_cores(replace(place, core_sharers=1), TWO, ALL_OF_TWO, 1) == {4, 5, 6, 7}


@pytest.mark.parametrize(
    "why, place, usable",
    [
        ("the launcher bound it", Place(core_sharers=2), frozenset(range(4))),
        ("alone on the host", Place(core_sharers=1), frozenset(range(8))),
        ("fewer cores than ranks", Place(core_sharers=5), frozenset(range(8))),
    ],
)
def test_a_rank_is_left_alone(why: str, place: Place, usable: frozenset[int]) -> None:
    assert choose_cores(place, ONE, usable, None) == frozenset(), why


def test_binding_ends_with_the_session() -> None:
    before = os.sched_getaffinity(0)
    with on_cores(frozenset({min(before)})):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with on_cores(frozenset({10**4})):  # refused by the system
        assert os.sched_getaffinity(0) == before


LINKS = (
    Interface(name="lo", up=True, loopback=True, addresses=("127.0.0.1",)),
    Interface(name="eth7", up=True, addresses=("10.9.8.7",)),
    Interface(name="ib7", up=False, addresses=("10.9.8.8",)),
    Interface(name="bare", up=True),
)
TWO_HOSTS = Ranks(rank=0, world=2, local_rank=0, local_world=1, launcher="torchrun")


@pytest.mark.parametrize(
    "wanted, words", [("eth9", "is no network"), ("ib7", "is down"), ("bare", "no address")]
)
def test_a_wrong_interface(wanted: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_interface(wanted, TWO_HOSTS, "10.9.8.1", LINKS)
    assert f"run.interface={wanted}" in str(caught.value)
    assert words in str(caught.value)
    assert "are lo, eth7;" in str(caught.value)


def test_ranks_of_one_host_choose_no_interface() -> None:
    together = replace(TWO_HOSTS, local_world=2)
    assert choose_interface(None, together, "10.9.8.1", LINKS) is None
    assert choose_interface(None, TWO_HOSTS, "127.0.0.1", LINKS) is None
    assert choose_interface("eth7", together, "127.0.0.1", LINKS) == "eth7"
    with pytest.raises(UserError):
        choose_interface("eth9", together, "127.0.0.1", LINKS)


def test_the_interface_of_the_route() -> None:
    real = [one for one in network_interfaces() if one.up and not one.loopback and one.addresses]
    if not real:
        pytest.skip("this host has no network")
    # A host reaches its own address over loopback, and knows it by the interface that has it.
    target = real[0].addresses[0]
    environ = {"MASTER_ADDR": target, "NCCL_SOCKET_IFNAME": "kept"}
    assert use_interface(environ, None, TWO_HOSTS) == real[0].name
    assert environ["GLOO_SOCKET_IFNAME"] == environ["TP_SOCKET_IFNAME"] == real[0].name
    assert environ["NCCL_SOCKET_IFNAME"] == "kept"
    use_interface(environ, real[0].name, TWO_HOSTS)
    assert environ["NCCL_SOCKET_IFNAME"] == f"={real[0].name}"


def test_no_interface_is_set_alone(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    assert use_interface(environ, "eth9", Ranks()) is None
    assert environ == {}

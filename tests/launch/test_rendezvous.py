"""Ranks find those of their own life in a store that keeps what dead ones wrote."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from ringattn.errors import CommunicationError
from ringattn.launch.rendezvous import join_life

WORLD = 3


@pytest.fixture
def server() -> dist.TCPStore:
    """Outlives the ranks, as a launcher's store does."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _join(server: dist.TCPStore, ranks: range, seconds: float = 30.0) -> list[dist.Store]:
    """The stores of ranks that come at the same time, each with a connection of its own."""

    def join(rank: int) -> dist.Store:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        return join_life(store, rank, WORLD, timedelta(seconds=seconds))

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(join, ranks))


def test_all_ranks_get_the_same_part_of_the_store(server: dist.TCPStore) -> None:
    first, *others = _join(server, range(WORLD))
    first.set("key", "value")
    assert [store.get("key") for store in others] == [b"value"] * (WORLD - 1)


def test_a_later_life_sees_nothing_of_an_earlier_one(server: dist.TCPStore) -> None:
    for life in range(5):
        stores = _join(server, range(WORLD))
        assert not stores[0].check(["key"]), f"life {life}"
        stores[-1].set("key", "value")
        assert stores[0].get("key") == b"value"


@pytest.mark.parametrize("dead", [range(1), range(1, WORLD), range(WORLD - 1)])
def test_ranks_that_died_while_they_joined_are_forgotten(
    server: dist.TCPStore, dead: range
) -> None:
    """Whichever of them came, and however far."""
    with pytest.raises(CommunicationError):
        _join(server, dead, seconds=0.3)
    server.set(f"ringattn/hello/{WORLD - 1}", uuid.uuid4().hex)
    stores = _join(server, range(WORLD))
    stores[0].set("key", "value")
    assert stores[-1].get("key") == b"value"


def test_missing_ranks_are_named(server: dist.TCPStore) -> None:
    with pytest.raises(CommunicationError, match=r"ranks 1, 2 .*run\.timeout_s"):
        _join(server, range(1), seconds=0.1)

"""A schedule as one rank sees it: for each step what to post, compute and land."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ringattn.bounds import check_bounds
from ringattn.kernels.base import Kernel
from ringattn.schedule import Schedule, block_tiles_of, tiles_of


@dataclass(frozen=True)
class Part:
    """One move's place in a slot: rows and heads to read or write.

    `key` is (channel, slot); `wire` says in which dtype the data travels; the slot's first `skip`
    tensors do not.
    """

    key: tuple[int, int]
    rows: slice
    heads: slice
    skip: int
    wire: int
    op: int
    take: bool
    order: int


@dataclass(frozen=True)
class Message:
    """All parts that travel together between this rank and a peer."""

    peer: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Exchange:
    """A batch of messages that share (post, land, lane). `tag` numbers it within the schedule."""

    tag: int
    land: int
    lane: int
    long: bool
    sends: tuple[Message, ...]
    recvs: tuple[Message, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: all tiles of one step that share their operand slots."""

    qslot: int
    kslot: int
    oslot: int
    gslot: int
    prepared: Any


@dataclass(frozen=True)
class Step:
    """What one rank does in one step, in this order. `lands` are the tags that end here."""

    posts: tuple[Exchange, ...]
    launches: tuple[Launch, ...]
    lands: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """One rank's part of a schedule, ready to run with one kernel on one device.

    `classes` are the (lane, long-lived) classes that any rank uses: equal on all ranks.
    """

    schedule: Schedule
    rank: int
    kernel: Kernel
    steps: tuple[Step, ...]
    slots: tuple[tuple[tuple[int, int], int, int], ...]
    classes: tuple[tuple[int, bool], ...]


def build_program(schedule: Schedule, rank: int, kernel: Kernel, device: torch.device) -> Program:
    """Selects a rank's tasks and moves and prepares its kernel launches. No communication.

    Raises PlanError for a schedule that reaches beyond its slots or writes to the caller's tensors.
    """
    check_bounds(schedule)
    exchanges = _exchanges(schedule, rank)
    launches = _launches(schedule, rank, kernel, device)
    # Packing takes time on a GPU: the slower lane is packed first, on every rank alike.
    posts = sorted(exchanges, key=lambda found: -found[1].lane)
    steps = tuple(
        Step(
            posts=tuple(e for post, e in posts if post == step),
            launches=launches.get(step, ()),
            lands=tuple(e.tag for _, e in exchanges if e.land == step),
        )
        for step in range(schedule.nsteps)
    )
    mine = schedule.slots[schedule.slots["rank"] == rank]
    slots = tuple(
        ((int(s["channel"]), int(s["slot"])), int(s["rows"]), int(s["heads"])) for s in mine
    )
    moves = schedule.moves
    pairs = np.unique(np.stack([moves["lane"], moves["land"] > moves["post"]], axis=1), axis=0)
    classes = tuple((int(lane), bool(long)) for lane, long in pairs)
    return Program(schedule, rank, kernel, steps, slots, classes)


def _launches(
    schedule: Schedule, rank: int, kernel: Kernel, device: torch.device
) -> dict[int, tuple[Launch, ...]]:
    tasks = schedule.tasks[schedule.tasks["rank"] == rank]
    names = ("step", "qslot", "kslot", "oslot", "gslot")
    keys = np.stack([tasks[n] for n in names], axis=1)
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    table: dict[int, tuple[Launch, ...]] = {}
    for index, key in enumerate(unique):
        step, qslot, kslot, oslot, gslot = (int(x) for x in key)
        mine = tasks[inverse == index]
        blocks = block_tiles_of(mine, schedule.matrices)
        prepared = kernel.prepare(tiles_of(mine), device, blocks)
        table[step] = (*table.get(step, ()), Launch(qslot, kslot, oslot, gslot, prepared))
    return table


def exchange_tags(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """(post, land, lane) of every exchange by its tag, and the tag of every move."""
    moves = schedule.moves
    classes = np.stack([moves["post"], moves["land"], moves["lane"]], axis=1)
    unique, tags = np.unique(classes, axis=0, return_inverse=True)
    return unique, tags.reshape(-1)


def _exchanges(schedule: Schedule, rank: int) -> list[tuple[int, Exchange]]:
    """This rank's exchanges with their posts, in the order that all ranks share."""
    moves = schedule.moves
    unique, tags = exchange_tags(schedule)
    index = np.flatnonzero((moves["src"] == rank) | (moves["dst"] == rank))
    index = index[np.argsort(tags[index], kind="stable")]
    result = []
    for tag, group in groupby(index, key=lambda i: int(tags[i])):
        post, land, lane = (int(x) for x in unique[tag])
        members = list(group)
        sends = _messages(moves, [i for i in members if moves["src"][i] == rank], send=True)
        recvs = _messages(moves, [i for i in members if moves["dst"][i] == rank], send=False)
        result.append((post, Exchange(tag, land, lane, land > post, sends, recvs)))
    return result


def _messages(moves: np.ndarray, members: list[int], *, send: bool) -> tuple[Message, ...]:
    """Coalesces moves per peer, in table order, so that both ends cut a message alike."""
    peer, slot, row, head = ("dst", "sslot", "s0", "sh") if send else ("src", "dslot", "d0", "dh")
    by_peer: dict[int, list[Part]] = {}
    for i in members:
        m = moves[i]
        part = Part(
            key=(int(m["channel"]), int(m[slot])),
            rows=slice(int(m[row]), int(m[row] + m["rows"])),
            heads=slice(int(m[head]), int(m[head] + m["nheads"])),
            skip=int(m["skip"]),
            wire=int(m["dtype"]),
            op=int(m["op"]),
            take=bool(m["take"]),
            order=int(i),
        )
        by_peer.setdefault(int(m[peer]), []).append(part)
    return tuple(Message(p, tuple(parts)) for p, parts in sorted(by_peer.items()))

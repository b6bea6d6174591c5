"""Moves of a schedule as messages and copies: what travels together, and how long it takes."""

from dataclasses import dataclass

import numpy as np

from ringattn.cost.cluster import Cluster
from ringattn.schedule import Channel, Lane, Op, Schedule


@dataclass(frozen=True, eq=False, kw_only=True)
class Messages:
    """Rows that go from one rank to another in one batch, one entry per message.

    A batch is all messages with equal (post, lane, land); messages are sorted by batch.

    Attributes:
        src, dst, post, land, lane: as in a move. nbytes: of the message.
        bounds: first message of each batch, and the number of messages.
    """

    src: np.ndarray
    dst: np.ndarray
    post: np.ndarray
    land: np.ndarray
    lane: np.ndarray
    nbytes: np.ndarray
    bounds: np.ndarray


def messages_of(schedule: Schedule) -> Messages:
    """Messages of all moves between ranks."""
    far = schedule.moves["src"] != schedule.moves["dst"]
    moves, sizes = schedule.moves[far], schedule.move_bytes[far]
    world, steps = schedule.world, schedule.nsteps + 1
    batch = (moves["post"] * len(Lane) + moves["lane"]) * steps + moves["land"]
    key = (batch * world + moves["src"]) * world + moves["dst"]
    key, index, inverse = np.unique(key, return_index=True, return_inverse=True)
    head, numbers = moves[index], batch[index]
    changes = np.flatnonzero(np.diff(numbers)) + 1
    bounds = np.concatenate([[0], changes, [len(key)]]) if len(key) else np.zeros(1, dtype=int)
    return Messages(
        src=head["src"].copy(),
        dst=head["dst"].copy(),
        post=head["post"].copy(),
        land=head["land"].copy(),
        lane=head["lane"].copy(),
        nbytes=np.bincount(inverse, sizes, len(key)),
        bounds=bounds,
    )


def message_seconds(messages: Messages, cluster: Cluster, world: int) -> np.ndarray:
    """Seconds of each message once both ranks have posted and their ports are free.

    A message is done when the busier of its two ports has moved everything of the batch: that is
    how grouped sends and receives complete. Ranks of a node that share a NIC share its port.
    """
    which = np.repeat(np.arange(len(messages.bounds) - 1), np.diff(messages.bounds))
    inter = messages.lane == Lane.INTER
    combined = max(cluster.nics_per_node / cluster.ranks_per_node, 1.0)
    rate = np.where(inter, cluster.inter.gbs * combined, cluster.intra.gbs) * 1e9
    latency = np.where(inter, cluster.inter.latency_us, cluster.intra.latency_us)
    further = np.where(inter, cluster.inter.message_us, cluster.intra.message_us)
    seconds = np.zeros(len(which))
    for rank in (messages.src, messages.dst):
        port = which * (3 * world) + _ports(rank, inter, cluster, world)
        load = np.bincount(port, messages.nbytes)[port]
        mine = which * world + rank
        count = np.bincount(mine)[mine]
        seconds = np.maximum(seconds, load / rate + 1e-6 * (latency + further * (count - 1)))
    return seconds


def _ports(rank: np.ndarray, inter: np.ndarray, cluster: Cluster, world: int) -> np.ndarray:
    """The port of a rank on a lane: its own inside a node, its NIC between nodes; below 3 P."""
    node, local = np.divmod(rank, cluster.ranks_per_node)
    nics = min(cluster.nics_per_node, cluster.ranks_per_node)
    shared = -(-cluster.ranks_per_node // nics)
    nic = node * cluster.ranks_per_node + local // shared * shared
    return np.where(inter, world + nic, rank)


def copied_bytes(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Memory traffic of packing before a step's posts and of its landings, (steps, P) each.

    One run of rows with all their heads travels as it lies; scattered runs and slices of heads are
    packed by the sender and unpacked by the receiver, a read and a write each. An ADD reads the
    payload and the accumulator and writes the accumulator. A local copy reads and writes.
    """
    moves, world = schedule.moves, schedule.world
    shape = (max(schedule.nsteps, 1), world)
    if not len(moves):
        return np.zeros(shape), np.zeros(shape)
    sizes = schedule.payload_bytes
    key = (moves["post"] * (schedule.nsteps + 1) + moves["land"]) * world + moves["src"]
    key = (key * world + moves["dst"]) * len(Channel) + moves["channel"]
    _, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    heads = np.array([schedule.shapes.heads(c) for c in Channel])[moves["channel"]]
    far = moves["src"] != moves["dst"]
    packed = (count[inverse] > 1) | (moves["nheads"] < heads) | ~far
    pack = np.where(packed & far, 2 * sizes, 0)
    unpack = np.where(moves["op"] == Op.ADD, 3 * sizes, np.where(packed, 2 * sizes, 0))

    def table(step: str, rank: str, weights: np.ndarray) -> np.ndarray:
        flat = moves[step] * world + moves[rank]
        return np.bincount(flat, weights, shape[0] * world).reshape(shape)

    return table("post", "src", pack), table("land", "dst", unpack)

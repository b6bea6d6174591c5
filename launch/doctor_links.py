"""Links between ranks: bandwidth, latency, and whether every byte arrives, pair by pair.

Pairs exchange messages in both directions at once, through the fabric that carries a plan's moves.
They meet in rounds of disjoint pairs of one lane, so that a round loads a node's links as a plan
does. Small worlds let every rank meet every other (a round-robin tournament, by the circle method);
large ones the neighbours at distances 1, 2, 4, … inside nodes and between them.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ringattn.launch.doctor_wait import finish
from ringattn.parallel.fabric import Fabric
from ringattn.schedule import Lane

ROUNDS = 40  # of both lanes together, about; a round of links between nodes takes some 0.1 s
_SMALL = 256  # bytes of the messages that latency is measured with
_HEADER = 3 * 8


@dataclass(frozen=True)
class Round:
    """Disjoint pairs of ranks, all inside nodes or all between nodes."""

    lane: Lane
    pairs: tuple[tuple[int, int], ...]

    def peer_of(self, rank: int) -> int | None:
        """Whom a rank meets."""
        for a, b in self.pairs:
            if rank in (a, b):
                return b if rank == a else a
        return None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much a pair exchanges: bytes of a large message, and how many small and large ones."""

    nbytes: int
    small: int = 20
    large: int = 4


def sizes_for(direct: bool, quick: bool) -> Sizes:
    """Sizes for messages between GPUs, or through host memory."""
    if direct:
        return Sizes(nbytes=(16 if quick else 64) << 20, large=3 if quick else 8)
    return Sizes(nbytes=(1 if quick else 4) << 20, large=2 if quick else 6)


def link_rounds(world: int, node: int, limit: int = ROUNDS) -> list[Round]:
    """Rounds in which ranks meet, nodes being `node` consecutive ranks (the last may be smaller).

    All pairs meet exactly once where that takes at most `limit` rounds per lane.
    """
    nodes = -(-world // node)
    rounds = [
        _round(
            Lane.INTRA, world, ((n * node + a, n * node + b) for n in range(nodes) for a, b in p)
        )
        for p in _meetings(min(node, world), limit)
    ]
    between = _meetings(nodes, limit)
    # Each of the `node` ranks of a node meets one of the other node in a round; shifted, another.
    shifts = range(node) if len(between) * node <= limit else range(1)
    rounds += [
        _round(
            Lane.INTER,
            world,
            ((a * node + i, b * node + (i + s) % node) for a, b in p for i in range(node)),
        )
        for p in between
        for s in shifts
    ]
    return [found for found in rounds if found.pairs]


def _round(lane: Lane, world: int, pairs: Iterator[tuple[int, int]]) -> Round:
    return Round(lane, tuple((a, b) for a, b in pairs if max(a, b) < world))


def _meetings(count: int, limit: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs among 0 … count - 1."""
    if count < 2:
        return []
    seats = count + count % 2  # with an odd number one has no partner
    if seats - 1 <= limit:
        return [list(_circle(seats, count, turn)) for turn in range(seats - 1)]
    distances = [1 << i for i in range(count.bit_length()) if 1 << i <= count // 2]
    return [pairs for distance in distances for pairs in _at_distance(count, distance)]


def _circle(seats: int, count: int, turn: int) -> Iterator[tuple[int, int]]:
    """One turn of the circle method: the last seat stays, the others go round it."""
    ring = [(turn + i) % (seats - 1) for i in range(seats - 1)]
    pairs = [(ring[0], seats - 1), *((ring[i], ring[-i]) for i in range(1, seats // 2))]
    return ((min(p), max(p)) for p in pairs if max(p) < count)


def _at_distance(count: int, distance: int) -> list[list[tuple[int, int]]]:
    """All pairs (i, i + distance) of a circle, in two or three rounds of disjoint pairs."""
    rounds: list[list[tuple[int, int]]] = [[], [], []]
    cycles = math.gcd(count, distance)
    length = count // cycles
    for start in range(cycles):
        for step in range(length if length > 2 else 1):
            a, b = (start + step * distance) % count, (start + (step + 1) * distance) % count
            last = length % 2 and step == length - 1  # closes an odd cycle
            rounds[2 if last else step % 2].append((min(a, b), max(a, b)))
    return [found for found in rounds if found]


def meet(
    fabric: Fabric, peer: int, device: torch.device, sizes: Sizes, lane: Lane, timeout: float
) -> dict[str, Any]:
    """Exchanges messages with one peer, which calls it too, and checks them.

    Args:
        fabric: opened for (lane, False).
        timeout: seconds for the whole meeting.

    Returns:
        latency_us: from posting a small message to the peer's in hand. gbs: 1e9 bytes per second
        and direction, both at once. wrong: what did not arrive as sent, or "".

    Raises:
        RuntimeError: the peer did not answer, or the link failed.
    """
    deadline = time.monotonic() + timeout
    tag = 0
    wrong = ""

    def exchange(sent: torch.Tensor, got: torch.Tensor, count: int) -> float:
        nonlocal tag
        start = time.perf_counter()
        for _ in range(count):
            handle = fabric.exchange(
                [(peer, sent)], [(peer, got)], lane=int(lane), long=False, tag=tag
            )
            handle.wait()
            tag += 1
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer from rank {peer} in {timeout:g} s")
        finish(device, deadline)
        return (time.perf_counter() - start) / count

    seconds = {}
    for nbytes, count in ((_SMALL, sizes.small), (sizes.nbytes, sizes.large)):
        sent = pattern(nbytes, fabric.rank, peer, device)
        want = pattern(nbytes, peer, fabric.rank, device)
        got = torch.zeros_like(sent)
        exchange(sent, got, 1)  # opens the connection
        wrong = wrong or difference(want, got)
        got.zero_()
        seconds[nbytes] = exchange(sent, got, count)
        wrong = wrong or difference(want, got)
    return {
        "latency_us": 1e6 * seconds[_SMALL],
        "gbs": sizes.nbytes / seconds[sizes.nbytes] / 1e9,
        "wrong": wrong,
    }


def pattern(nbytes: int, source: int, target: int, device: torch.device) -> torch.Tensor:
    """The message from one rank to another: who sends and who is meant, then counting bytes."""
    body = torch.arange(nbytes, dtype=torch.int32, device=device).remainder_(251).to(torch.uint8)
    header = torch.tensor([source, target, nbytes], dtype=torch.int64)
    body[:_HEADER] = header.view(torch.uint8).to(device)
    return body


def difference(want: torch.Tensor, got: torch.Tensor) -> str:
    """How many bytes differ and where the first one lies; "" for none."""
    if torch.equal(want, got):
        return ""
    places = (want != got).nonzero()
    return f"{len(places):,} of {want.numel():,} bytes wrong, the first at {int(places[0]):,}"


def reduce_all(
    group: dist.ProcessGroup, device: torch.device, nbytes: int, timeout: float
) -> dict[str, Any]:
    """Sums numbers over all ranks and checks the sums; each time within `timeout` seconds.

    Returns:
        gbs: bytes that a rank sends in a ring, 2 (P - 1) / P of the message, by the time.
        wrong: as in `meet`.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    counting = torch.arange(nbytes // 4, device=device).remainder_(1024).float()
    want = world * counting + world * (world - 1) // 2
    wrong, seconds = "", math.inf
    for _ in range(3):
        mine = counting + rank
        finish(device, time.monotonic() + timeout)
        start = time.perf_counter()
        work = dist.all_reduce(mine, group=group, async_op=True)
        assert work is not None
        work.wait()
        finish(device, time.monotonic() + timeout)
        seconds = min(seconds, time.perf_counter() - start)
        if not torch.equal(mine, want):
            places = (mine != want).nonzero()
            wrong = f"{len(places):,} of {len(mine):,} sums wrong, the first at {int(places[0]):,}"
    return {"gbs": 2 * (world - 1) / world * nbytes / seconds / 1e9, "wrong": wrong}


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """What two ranks found together: of two directions the worse figure."""

    lane: str
    ranks: tuple[int, int]
    latency_us: float = math.nan
    gbs: float = math.nan
    wrong: str = ""
    error: str = ""


def merge_round(found: Round, answers: Sequence[dict[str, Any] | None]) -> list[PairResult]:
    """Both ranks' answers for each pair of a round."""
    results = []
    for pair in found.pairs:
        both = [(rank, answers[rank] or {}) for rank in pair]
        wrong = [
            f"from rank {pair[0] + pair[1] - rank} to rank {rank}: {answer['wrong']}"
            for rank, answer in both
            if answer.get("wrong")
        ]
        errors = [f"rank {rank}: {answer['error']}" for rank, answer in both if "error" in answer]
        results.append(
            PairResult(
                lane=found.lane.name.lower(),
                ranks=pair,
                latency_us=max(answer.get("latency_us", math.nan) for _, answer in both),
                gbs=min(answer.get("gbs", math.nan) for _, answer in both),
                wrong="; ".join(wrong),
                error="; ".join(errors),
            )
        )
    return results

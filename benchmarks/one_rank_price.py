"""What the planner says of one rank: when its messages arrive, and how long it takes."""

from dataclasses import dataclass

import numpy as np

from ringattn.cost import Cluster, Priced, survey
from ringattn.cost.kernel_time import flops_per_pair, step_seconds
from ringattn.cost.messages import message_seconds, messages_of
from ringattn.parallel.paced import Timing
from ringattn.program import exchange_tags
from ringattn.schedule import Lane, Schedule


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One direction of one rank, in seconds.

    Attributes:
        seconds: as the planner prices it in the cluster, jitter included.
        compute: kernels alone, without jitter. copies: packing, unpacking and landing.
        flops: exact FLOPs of this rank, masked pairs not counted.
    """

    seconds: float
    compute: float
    copies: float
    flops: float

    @property
    def exposed(self) -> float:
        """Share of the time that is not kernels."""
        return max(0.0, 1 - self.compute / self.seconds)


def timings_of(
    schedule: Schedule, priced: Priced, rank: int, cluster: Cluster
) -> dict[int, Timing]:
    """When each batch of a rank starts and arrives, by tag: as `cost` prices its messages.

    A batch starts when its peers have posted it too. It is done when its slowest message is, sends
    included, which may wait for the port of a peer that serves many; its first byte comes after
    the lane's latency.
    """
    messages = messages_of(schedule)
    seconds = message_seconds(messages, cluster, schedule.world)
    batches = exchange_tags(schedule)[0]
    numbers = {tuple(row): tag for tag, row in enumerate(batches.tolist())}
    links = {Lane.INTRA: cluster.intra, Lane.INTER: cluster.inter}
    found: dict[int, Timing] = {}
    for index in np.flatnonzero((messages.src == rank) | (messages.dst == rank)):
        post, land, lane = (int(x[index]) for x in (messages.post, messages.land, messages.lane))
        tag = numbers[post, land, lane]
        peer = int(messages.src[index] + messages.dst[index]) - rank
        before = found.get(tag, Timing(0.0, 0.0))
        last = max(before.last, float(seconds[index]))
        first = min(1e-6 * links[Lane(lane)].latency_us, last)
        start = max(before.start, float(priced.begin[post, peer]))
        found[tag] = Timing(first, last, start)
    return found


def predict(
    schedule: Schedule, priced: Priced, rank: int, cluster: Cluster, kernel: str | None
) -> Prediction:
    """A rank's part of a schedule's price."""
    curve = cluster.kernel_named(kernel).curve(schedule.direction)
    counts = survey(schedule, curve.block_rows, curve.block_keys)
    tasks = schedule.tasks[schedule.tasks["rank"] == rank]
    pairs = float((tasks["area"] * (tasks["h1"] - tasks["h0"])).sum())
    return Prediction(
        seconds=float(priced.rank_seconds[rank]),
        compute=float(step_seconds(counts.load, curve, cluster)[:, rank].sum()),
        copies=float(priced.copies[rank]),
        flops=pairs * flops_per_pair(schedule),
    )

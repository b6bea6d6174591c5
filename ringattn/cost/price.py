"""Prices a schedule on a cluster: when each rank computes, waits and finishes.

Ranks progress on their own. In every step a rank posts the step's messages, computes its tasks,
and goes on when the messages that land there have arrived. A message starts when both its ranks
have posted it and their ports on its lane are free. Nothing but the plan and the cluster file
enters, so that all ranks compute equal prices.
"""

import math

import numpy as np

from ringattn.cost.cluster import Cluster, Curve
from ringattn.cost.host_work import host_seconds
from ringattn.cost.kernel_time import step_seconds
from ringattn.cost.messages import message_seconds
from ringattn.cost.priced import Priced
from ringattn.cost.shared_cores import play
from ringattn.cost.survey import Survey, survey
from ringattn.schedule import Lane, Schedule


def price(schedule: Schedule, cluster: Cluster, kernel: str | None = None) -> Priced:
    """Predicts one direction of a plan, per batch element; pure host work.

    Args:
        schedule: the plan; its lanes say which moves cross nodes.
        cluster: what it runs on. kernel: one of `cluster.kernels`; default `cluster.kernel`.
    """
    curve = cluster.kernel_named(kernel).curve(schedule.direction)
    counts = survey(
        schedule,
        curve.block_rows,
        curve.block_keys,
        cut=curve.cut,
        host=cluster.on_cores is not None,
    )
    return price_survey(counts, cluster, curve)


def price_pair(
    schedules: tuple[Schedule, Schedule], cluster: Cluster, kernel: str | None = None
) -> tuple[Priced, Priced]:
    """Forward and backward of a plan; its predicted time is the sum of both `seconds`."""
    forward, backward = schedules
    return price(forward, cluster, kernel), price(backward, cluster, kernel)


def price_survey(counts: Survey, cluster: Cluster, curve: Curve) -> Priced:
    """Predicts a schedule that is surveyed already, for a kernel's curve of its direction."""
    work = step_seconds(counts.load, curve, cluster) * straggling(cluster, counts.world)
    carrying = None
    if cluster.on_cores is not None and counts.host is not None:
        pack, unpack = host_seconds(counts.host, cluster.on_cores)
        played = play(counts, cluster, cluster.on_cores, work, pack, unpack)
        (begin, end, finish, sent, done), carrying = played.times, played.carrying
    else:
        memory = 1e9 * cluster.memory_gbs
        pack, unpack = counts.pack / memory, counts.unpack / memory
        begin, end, finish, sent, done = _run(counts, cluster, work, pack, unpack)
    messages = counts.messages
    return Priced(
        direction=counts.direction,
        seconds=float(finish.max(initial=0.0)),
        rank_seconds=finish,
        compute=work.sum(axis=0),
        copies=(pack + unpack).sum(axis=0),
        begin=begin,
        end=end,
        src=messages.src,
        dst=messages.dst,
        lane=messages.lane,
        nbytes=messages.nbytes,
        sent=sent,
        done=done,
        received=counts.received,
        area=counts.area,
        flops=counts.flops,
        carrying=carrying,
    )


def straggling(cluster: Cluster, world: int) -> float:
    """Expected slowest of P ranks whose kernel times vary normally, over their mean."""
    return 1.0 + cluster.jitter * math.sqrt(2.0 * math.log(world))


def _run(
    counts: Survey, cluster: Cluster, work: np.ndarray, pack: np.ndarray, unpack: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Plays the steps: begin and end of compute (steps, P), end of each rank, message times."""
    steps, world = work.shape
    messages = counts.messages
    seconds = message_seconds(messages, cluster, world)
    ready, free = np.zeros(world), np.zeros((len(Lane), world))
    arrival, begin, end = (np.zeros((steps, world)) for _ in range(3))
    sent, done = np.zeros(len(seconds)), np.zeros(len(seconds))
    batches = np.searchsorted(messages.post[messages.bounds[:-1]], np.arange(steps + 1))
    for step in range(steps):
        ready = ready + pack[step]
        busy = ready
        for index in range(batches[step], batches[step + 1]):
            part = slice(messages.bounds[index], messages.bounds[index + 1])
            lane, land = messages.lane[part.start], messages.land[part.start]
            src, dst = messages.src[part], messages.dst[part]
            port = np.maximum(ready, free[lane])
            sent[part] = np.maximum(port[src], port[dst])
            done[part] = sent[part] + seconds[part]
            # A rank's batch completes as a whole.
            port = free[lane].copy()
            np.maximum.at(port, src, done[part])
            np.maximum.at(port, dst, done[part])
            free[lane] = port
            np.maximum.at(arrival[land], dst, port[dst])
            busy = np.maximum(busy, port)
        begin[step] = ready
        taxed = cluster.overlap_tax * np.minimum(work[step], busy - ready)
        end[step] = ready + work[step] + taxed
        ready = np.maximum(end[step], arrival[step]) + unpack[step]
    return begin, end, ready, sent, done

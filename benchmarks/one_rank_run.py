"""Playing one rank of a plan on one device, with messages at the network's pace and without."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import ringattn as ra
from ringattn.arena import Arena
from ringattn.benchmarks.one_rank_price import Prediction, predict, timings_of
from ringattn.cost import Cluster, price_pair
from ringattn.executor import Run, Slots, backward_home, forward_home
from ringattn.parallel.paced import Arrival, Carrier, HostCarrier, PacedFabric, Timing
from ringattn.program import Program
from ringattn.schedule import ACCUMULATORS, Channel, Direction, Lane

LEAST, MOST = 3, 30  # repetitions


@dataclass(frozen=True, kw_only=True)
class Played:
    """One direction of one rank, measured. Times in seconds, medians.

    Attributes:
        seconds: with messages. spread: half the interquartile range.
        compute: the same kernels on the same buffers, nothing moved, packed or merged from others.
        stretch: compute over its prediction; the peers are taken to be slower by as much.
        host: until the host had enqueued everything; near `seconds`, the host is the limit.
        arrivals: all batches of the last repetition.
    """

    seconds: float
    spread: float
    compute: float
    stretch: float
    host: float
    arrivals: tuple[Arrival, ...]

    @property
    def exposed(self) -> float:
        """Share of the time that is not kernels: what communication adds, packing included."""
        return max(0.0, 1 - self.compute / self.seconds)

    @property
    def lateness(self) -> dict[str, tuple[float, float]]:
        """Per lane the median and the largest of achieved over asked seconds, less 1."""
        found = {}
        for lane in Lane:
            over = [a.achieved / a.asked - 1 for a in self.arrivals if a.lane == lane and a.asked]
            if over:
                found[lane.name.lower()] = (statistics.median(over), max(over))
        return found


def make_carrier(device: torch.device) -> Carrier:
    """The carrier for a device: inter-node messages lie in host memory."""
    if device.type == "cpu":
        return HostCarrier()
    # Needs Triton, which a CPU machine need not have.
    from ringattn.parallel.paced_cuda import CudaCarrier

    return CudaCarrier(device, (Lane.INTER,))


class Player:
    """One rank of a plan over simulated ranks, with random data. Nothing is communicated.

    Args:
        plan: of a `ContextParallel` over simulated ranks.
        rank: which one to play.
        device: where.
        carrier: brings the messages.
        cluster: whose network they come over; it also predicts when peers are ready.

    Attributes:
        kernel: name of the local kernel. priced_as: of the cluster's kernel that predictions use.
        predictions: by direction.
    """

    def __init__(
        self, plan: ra.Plan, rank: int, device: torch.device, carrier: Carrier, cluster: Cluster
    ) -> None:
        self.plan, self.rank, self.device, self.carrier = plan, rank, device, carrier
        (heads, key_heads), (qk_dim, v_dim) = plan.context.heads, plan.context.head_dim
        rows, dtype = int(plan.layout.sizes[rank]), plan.context.dtype
        generator = torch.Generator(device).manual_seed(0)

        def draw(count: int, dim: int) -> torch.Tensor:
            made = torch.randn(1, rows, count, dim, device=device, generator=generator)
            return made.to(dtype)

        self.q, self.k = draw(heads, qk_dim), draw(key_heads, qk_dim)
        self.v, self.dout = draw(key_heads, v_dim), draw(heads, v_dim)
        self._arena, self._scale = Arena(), 1 / math.sqrt(qk_dim)
        self._home: dict[Direction, Callable[[], Slots]] = {
            "forward": lambda: forward_home(self.q, self.k, self.v, None)
        }
        chosen = plan.chosen_program("forward", rank, self._home["forward"](), None)
        self.kernel = chosen.kernel.name
        known = self.kernel if self.kernel in cluster.kernels else cluster.kernel
        self.priced_as, schedules = known, (plan.forward, plan.backward)
        self._timings: dict[Direction, dict[int, Timing]] = {}
        self.predictions: dict[Direction, Prediction] = {}
        for schedule, priced in zip(schedules, price_pair(schedules, cluster, known), strict=True):
            way = schedule.direction
            self._timings[way] = timings_of(schedule, priced, rank, cluster)
            self.predictions[way] = predict(schedule, priced, rank, cluster, known)
        self._saved: Slots = {}
        self._start_backward()

    def _start_backward(self) -> None:
        """Runs the forward once: the backward starts from its lse, delta and saved slots."""
        run = self._execute("forward", self._home["forward"](), self.fabric("forward"))
        kept = (key for key in self.plan.forward.saved if key in run.slots)
        self._saved = {key: tuple(t.clone() for t in run.slots[key]) for key in kept}
        out, lse = run.slots[Channel.O, 0]
        delta = (self.dout.to(lse.dtype) * out).sum(-1)
        self.carrier.seconds()
        self._home["backward"] = lambda: backward_home(
            self.dout, self.q, self.k, self.v, lse, delta
        )

    def program(self, direction: Direction) -> Program:
        """This rank's part of a direction."""
        return self.plan.program(direction, self.rank, self.kernel, self.device)

    def fabric(self, direction: Direction, stretch: float = 0.0) -> PacedFabric:
        """A fabric that brings the messages of a direction. Peers are ready when the planner says,
        times `stretch`."""
        timings = {
            tag: replace(timing, start=timing.start * stretch)
            for tag, timing in self._timings[direction].items()
        }
        return PacedFabric(self.rank, self.plan.world, timings, self.carrier)

    def play(self, direction: Direction, seconds: float) -> Played:
        """Measures a direction for about so long."""
        idle = self._filled(direction)
        bare = [
            self._time(lambda: [idle.compute(step) for step in idle.program.steps])[0]
            for _ in range(LEAST + 1)
        ]
        compute = statistics.median(bare[1:])
        stretch = compute / self.predictions[direction].compute
        times, hosts, deadline = [], [], time.perf_counter() + seconds
        arrivals: list[Arrival] = []
        while len(times) < LEAST + 1 or (len(times) <= MOST and time.perf_counter() < deadline):
            home, fabric = self._home[direction](), self.fabric(direction, stretch)
            taken, host = self._time(lambda h=home, f=fabric: self._execute(direction, h, f))
            times.append(taken)
            hosts.append(host)
            arrivals = fabric.arrivals()
        low, middle, high = statistics.quantiles(times[1:], n=4)  # the first one warms up
        return Played(
            seconds=middle,
            spread=(high - low) / 2,
            compute=compute,
            stretch=stretch,
            host=statistics.median(hosts[1:]),
            arrivals=tuple(arrivals),
        )

    def _execute(self, direction: Direction, home: Slots, fabric: PacedFabric) -> Run:
        run = self._run(direction, home, fabric)
        fabric.open(run.program.classes)
        run.execute()
        return run

    def _run(self, direction: Direction, home: Slots, fabric: PacedFabric) -> Run:
        saved = self._saved if direction == "backward" else {}
        return Run(
            self.program(direction), fabric, self._arena, home, self._scale, None, saved=saved
        )

    def _filled(self, direction: Direction) -> Run:
        """A run whose operands are all there already."""
        run = self._run(direction, self._home[direction](), self.fabric(direction))
        for (channel, slot), tensors in run.slots.items():
            if slot and channel not in ACCUMULATORS and (channel, slot) not in self._saved:
                for tensor in tensors:
                    tensor.normal_()
        return run

    def _time(self, action: Callable[[], object]) -> tuple[float, float]:
        """Seconds that the action takes on the device, and until the host is through with it."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            action()
            taken = time.perf_counter() - start
            return taken, taken
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        begin.record()
        action()
        end.record()
        host = time.perf_counter() - start
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end), host


def idle_pace(
    carrier: Carrier, device: torch.device, cluster: Cluster, nbytes: int, rounds: int = 5
) -> dict[str, float]:
    """Achieved over asked seconds, less 1, of lone messages on an idle device: medians by lane."""
    found = {}
    links = {Lane.INTRA: cluster.intra, Lane.INTER: cluster.inter}
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    for lane, link in links.items():
        latency = 1e-6 * link.latency_us
        timing = Timing(latency, latency + nbytes / (1e9 * link.gbs))
        fabric = PacedFabric(0, 2, dict.fromkeys(range(rounds + 1), timing), carrier)
        for tag in range(rounds + 1):
            fabric.exchange([], [(1, target)], lane=lane, long=False, tag=tag).wait()
        over = [a.achieved / a.asked - 1 for a in fabric.arrivals()[1:]]
        found[lane.name.lower()] = statistics.median(over)
    return found

"""Chooses layout, method and settings by predicted time on a cluster.

Candidates are planned and priced, forward and backward together, and the one whose slowest rank is
done first wins, the earlier on a tie. A candidate whose kernel work alone takes longer than the
best found is passed over: that bound never exceeds the predicted time, so that the choice is the
same. Nothing but mask, cluster and arguments enters, so that all ranks choose alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringattn import choice, layouts, methods
from ringattn.candidates import Candidate, candidates
from ringattn.cost import Cluster, Priced, peak_bytes, price
from ringattn.cost.kernel_time import pair_flops
from ringattn.errors import UserError
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.methods.common import Problem
from ringattn.schedule import Direction
from ringattn.tiles import cropped_area

DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


@dataclass(frozen=True, eq=False, kw_only=True)
class Quote:
    """A candidate with its plan and price, per batch element and layer.

    Attributes:
        candidate: what was planned. layout: its tokens' owners.
        schedules, priced: forward and backward.
        peak_bytes: most bytes beyond the shards on any rank in either direction.
    """

    candidate: Candidate
    layout: Layout
    schedules: choice.Schedules
    priced: tuple[Priced, Priced]
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Forward and backward of the slowest rank."""
        return self.priced[0].seconds + self.priced[1].seconds

    @property
    def tflops_per_rank(self) -> float:
        """Exact mask FLOPs of both directions over their time, per rank, in 1e12 per second."""
        flops = sum(p.flops for p in self.priced)
        return flops / (1e12 * self.layout.world * self.seconds) if self.seconds else 0.0

    @property
    def received(self) -> np.ndarray:
        """Bytes that each rank receives in both directions, int64 (lanes, P)."""
        return self.priced[0].received + self.priced[1].received

    @property
    def imbalance(self) -> float:
        """Kernel time of the busiest rank over the mean, of the worse direction."""
        return max(p.imbalance for p in self.priced)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A candidate that was not priced, and why."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """Priced candidates, fastest first, and those refused or passed over."""

    quotes: tuple[Quote, ...]
    refusals: tuple[Refusal, ...]

    @property
    def best(self) -> Quote:
        """The choice."""
        return self.quotes[0]

    @cached_property
    def reason(self) -> str:
        """Why the choice is the choice, in one sentence."""
        best = self.best
        text = (
            f"{best.candidate}: its slowest rank is predicted to need {1e3 * best.seconds:.3g} ms "
            f"forward and backward, the least of {len(self.quotes)} priced"
        )
        others = (q for q in self.quotes[1:] if q.candidate.method != best.candidate.method)
        if (other := next(others, None)) is not None and best.seconds:
            more = 100 * (other.seconds / best.seconds - 1)
            text += f"; the best other method, {other.candidate}, needs {more:.1f} % more"
        return text


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What prices depend on beside mask and candidate.

    Attributes:
        cluster: what plans are priced on. kernel: one of its kernels; None for its own.
        memory_limit: most bytes per batch element beyond the shards; None for no limit.
    """

    cluster: Cluster
    kernel: str | None = None
    memory_limit: int | None = None


_KEY_SIDE = ("ring", "direct", "double_ring", "all_gather")  # queries stay with their rank
_SHARED = ("usp", "ulysses", "hybrid")  # queries stay with u consecutive ranks
Pose = Callable[[Mask, Layout], Problem]


def compare(
    mask: Mask,
    world: int,
    ranks_per_node: int,
    layout: str | Layout,
    method: str,
    problem: Pose,
    terms: Terms,
    *,
    exhaustive: bool = False,
) -> Comparison:
    """Plans and prices candidates. Pure host work without communication.

    Args:
        mask: what is attended. world, ranks_per_node: the group.
        layout, method: names, or "auto"; a `Layout` is kept to.
        problem: poses a mask on a layout. Its options are kept to by methods that read them.
        terms: cluster and limits.
        exhaustive: price all candidates, those that cannot win too. The choice is the same.

    Raises:
        UserError: no candidate can be planned within the memory limit.
    """
    name = layout if isinstance(layout, str) else layout.name
    start = choice.fitting(layout, mask) if isinstance(layout, Layout) else None
    first = problem(mask, start or layouts.contiguous(mask.seq_len, world))
    posed: dict[str, Problem | UserError] = {first.layout.name: first}
    found = candidates(first.shapes, world, ranks_per_node, name, method)
    found = list(dict.fromkeys(_kept_to(candidate, first.options) for candidate in found))
    for entry in found:
        if entry.layout not in posed:
            posed[entry.layout] = _pose(entry.layout, mask, world, ranks_per_node, problem)
    if name == "auto":
        _drop_needless(mask, posed)
    floors = [_floor(entry, posed[entry.layout], terms) for entry in found]
    quotes: list[tuple[float, int, Quote]] = []
    refusals: list[Refusal] = []
    # The lowest bounds first, so that most others are passed over.
    for index in np.argsort([sum(floor) for floor in floors], kind="stable").tolist():
        best = min(quotes)[0] if quotes and not exhaustive else float("inf")
        try:
            quote = _quote(found[index], posed[found[index].layout], terms, floors[index], best)
            quotes.append((quote.seconds, index, quote))
        except UserError as error:
            refusals.append(Refusal(candidate=found[index], reason=str(error)))
    if not quotes:
        raise _nothing_left(refusals, terms)
    ranked = tuple(quote for _, _, quote in sorted(quotes, key=lambda entry: entry[:2]))
    return Comparison(quotes=ranked, refusals=tuple(refusals))


def _kept_to(candidate: Candidate, given: dict[str, int]) -> Candidate:
    """The candidate with the caller's settings in place of its own."""
    known = methods.by_name(candidate.method).options
    options = dict(candidate.options) | {k: v for k, v in given.items() if k in known}
    return Candidate(
        layout=candidate.layout, method=candidate.method, options=tuple(options.items())
    )


def _pose(
    name: str, mask: Mask, world: int, ranks_per_node: int, problem: Pose
) -> Problem | UserError:
    """The problem on a layout by name, or why there is none."""
    try:
        return problem(mask, layouts.by_name(name, mask, world, ranks_per_node))
    except UserError as error:
        return error


def _drop_needless(mask: Mask, posed: dict[str, Problem | UserError]) -> None:
    """Refuses a layout that equals another, and scattered chunks where long ranges balance."""
    whole, nodes = posed.get("hybrid"), posed.get("node_balanced")
    if (
        isinstance(whole, Problem)
        and isinstance(nodes, Problem)
        and np.array_equal(whole.layout.ranges, nodes.layout.ranges)
    ):
        posed["hybrid"] = UserError(
            "layout hybrid", "equals node_balanced on this mask", "use node_balanced"
        )
    for name in ("contiguous", "zigzag"):
        plain = posed[name]
        if isinstance(plain, Problem) and choice.imbalance(mask, plain.layout) <= choice.BALANCED:
            posed["area_greedy"] = UserError(
                "layout area_greedy", f"{name} balances the mask, in longer ranges", f"use {name}"
            )


def _floor(candidate: Candidate, problem: Problem | UserError, terms: Terms) -> tuple[float, float]:
    """Seconds that forward and backward take at least: exact FLOPs of the busiest head group.

    The u ranks of a head group share the work of their tokens, and nobody else does any of it.
    """
    if isinstance(problem, UserError) or (problem.layout.ranges["step"] > 1).any():
        return 0.0, 0.0
    ranges, world = problem.layout.ranges, problem.world
    order = np.argsort(ranges["start"])
    start, stop = ranges["start"][order], ranges["stop"][order]
    area = cropped_area(problem.mask.bands, start, stop)
    rank = np.bincount(ranges["owner"][order], weights=area, minlength=world)
    degree = 1 if candidate.method in _KEY_SIDE else candidate.u
    if candidate.method not in _KEY_SIDE + _SHARED or (candidate.method in _SHARED and degree == 1):
        return 0.0, 0.0  # queries travel, or the degree is left to the method
    if world % degree:
        return 0.0, 0.0
    busiest = float(rank.reshape(-1, degree).mean(axis=1).max())
    kernel, shapes = terms.cluster.kernel_named(terms.kernel), problem.shapes
    forward, backward = (
        busiest * shapes.q_heads * pair_flops(shapes, d) / (1e12 * kernel.curve(d).tflops)
        for d in DIRECTIONS
    )
    return forward, backward


def _quote(
    candidate: Candidate,
    problem: Problem | UserError,
    terms: Terms,
    floor: tuple[float, float],
    best: float,
) -> Quote:
    """Plans and prices a candidate; raises UserError where it is refused or cannot win."""
    if isinstance(problem, UserError):
        raise problem
    _pass_over(sum(floor), best)
    posed = problem.with_options(dict(candidate.options))
    method = methods.by_name(candidate.method)
    forward = method.forward(posed)
    there = price(forward, terms.cluster, terms.kernel)
    _pass_over(there.seconds + floor[1], best)
    backward = method.backward(posed)
    back = price(backward, terms.cluster, terms.kernel)
    peak = max(int(peak_bytes(schedule).max()) for schedule in (forward, backward))
    if terms.memory_limit is not None and peak > terms.memory_limit:
        raise UserError(
            f"memory_limit={terms.memory_limit}",
            f"the plan needs {peak} bytes beyond the shards",
            "raise the limit, use more ranks or another method",
        )
    return Quote(
        candidate=candidate,
        layout=problem.layout,
        schedules=(forward, backward),
        priced=(there, back),
        peak_bytes=peak,
    )


def _pass_over(least: float, best: float) -> None:
    # The margin covers rounding of the bound.
    if least > best * (1 + 1e-9):
        raise UserError(
            "passed over",
            f"needs at least {1e3 * least:.3g} ms",
            f"the best found needs {1e3 * best:.3g} ms",
        )


def _nothing_left(refusals: list[Refusal], terms: Terms) -> UserError:
    """Why there is no plan at all."""
    limit = "" if terms.memory_limit is None else f" within memory_limit={terms.memory_limit}"
    last = refusals[-1]
    return UserError(
        f"no plan{limit}",
        f"all {len(refusals)} candidates are refused, {last.candidate} because {last.reason}",
        "raise the limit, or choose another layout or method",
    )

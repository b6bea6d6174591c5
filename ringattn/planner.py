"""Chooses layout, method and settings by predicted time on a cluster.

Candidates are planned and priced, forward and backward together, and the one whose slowest rank is
done first wins, the earlier on a tie. A candidate whose kernel work alone takes longer than the
best found is passed over: that bound never exceeds the predicted time, so that the choice is the
same. Nothing but mask, cluster and arguments enters, so that all ranks choose alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ringattn import choice, layouts, methods
from ringattn.candidates import WIRES, Candidate, LayoutOptions, candidates
from ringattn.cost import Cluster, Priced, peak_bytes, price
from ringattn.cost.kernel_time import least_backward
from ringattn.errors import UserError
from ringattn.layout import Layout
from ringattn.least_time import KEY_SIDE, SHARED, least_seconds
from ringattn.masks import Mask
from ringattn.methods.common import Problem
from ringattn.refine import refine
from ringattn.schedule import Shapes


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
        any_wire: weigh partial results in the input dtype and in the accumulators'.
        layout_options: settings of a layout that is named.
        refine: plans that a search for a better layout may price, from the best found.
    """

    cluster: Cluster
    kernel: str | None = None
    memory_limit: int | None = None
    any_wire: bool = False
    layout_options: LayoutOptions = ()
    refine: int = 0


# Guesses of the time over its bound; the order in which candidates are weighed, never the choice.
_GUESS = {"hybrid": 1.0, "usp": 1.15, "loongtrain": 1.15, "tile": 2.0, "burst": 2.0}
_USUAL = 1.2
Pose = Callable[[Mask, Layout], Problem]
Posed = dict[tuple[str, LayoutOptions], Problem | UserError]


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
    posed: Posed = {(first.layout.name, ()): first}
    found = _found(first, ranks_per_node, name, method, terms)
    if start is not None:
        found = list(dict.fromkeys(replace(entry, layout_options=()) for entry in found))
    for entry in found:
        if entry.place not in posed:
            posed[entry.place] = _pose(entry.place, mask, world, ranks_per_node, problem)
    if name == "auto":
        _drop_needless(mask, posed)
    floors = [
        least_seconds(entry, posed[entry.place], terms.cluster, terms.kernel) for entry in found
    ]
    quotes: list[tuple[float, int, Quote]] = []
    refusals: list[Refusal] = []
    # The most promising first, so that most others are passed over.
    guesses = [sum(f) * _GUESS.get(c.method, _USUAL) for f, c in zip(floors, found, strict=True)]
    for index in np.argsort(guesses, kind="stable").tolist():
        best = min(quotes)[0] if quotes and not exhaustive else float("inf")
        try:
            quote = _quote(found[index], posed[found[index].place], terms, floors[index], best)
            quotes.append((quote.seconds, index, quote))
        except UserError as error:
            refusals.append(Refusal(candidate=found[index], reason=str(error)))
    if not quotes:
        raise _nothing_left(refusals, terms)
    ranked = tuple(quote for _, _, quote in sorted(quotes, key=lambda entry: entry[:2]))
    if terms.refine and start is None:
        better = _refined(mask, ranked[0], problem, terms)
        ranked = ranked if better is None else (better, *ranked)
    return Comparison(quotes=ranked, refusals=tuple(refusals))


def _refined(mask: Mask, best: Quote, problem: Pose, terms: Terms) -> Quote | None:
    """The best candidate on a layout that a search makes better; None where it finds none."""
    candidate = replace(best.candidate, layout="refined", layout_options=())
    quotes = {best.layout.key: best}
    if candidate.method not in KEY_SIDE + SHARED or best.layout.world % candidate.u:
        return None

    def priced(layout: Layout) -> tuple[float, np.ndarray]:
        if layout.key not in quotes:
            posed = problem(mask, layout)
            try:
                quotes[layout.key] = _quote(candidate, posed, terms, (0.0, 0.0), float("inf"))
            except UserError:  # needs too much memory
                return float("inf"), np.zeros(layout.world)
        quote = quotes[layout.key]
        return quote.seconds, quote.priced[0].compute + quote.priced[1].compute

    found = refine(mask, best.layout, candidate.u, priced, terms.refine)
    return None if found is best.layout else quotes[found.key]


def is_open(shapes: Shapes, world: int, ranks_per_node: int, method: str) -> bool:
    """Whether a method has settings to weigh."""
    return len(candidates(shapes, world, ranks_per_node, "contiguous", method)) > 1


def _found(
    posed: Problem, ranks_per_node: int, layout: str, method: str, terms: Terms
) -> list[Candidate]:
    """The candidates, with what the caller gave in place of their own settings."""
    found = candidates(posed.shapes, posed.world, ranks_per_node, layout, method)
    found = [_kept_to(entry, posed.options, terms) for entry in found]
    if terms.any_wire:
        found = [replace(entry, wire=wire) for entry in found for wire in WIRES]
    return list(dict.fromkeys(found))


def _kept_to(candidate: Candidate, given: dict[str, int], terms: Terms) -> Candidate:
    known = methods.by_name(candidate.method).options
    options = dict(candidate.options) | {k: v for k, v in given.items() if k in known}
    if options.get("stages") != 1 and "join" not in given:
        options.pop("join", None)
    return replace(
        candidate,
        options=tuple(options.items()),
        layout_options=terms.layout_options or candidate.layout_options,
    )


def _pose(
    place: tuple[str, LayoutOptions], mask: Mask, world: int, ranks_per_node: int, problem: Pose
) -> Problem | UserError:
    """The problem on a layout by name, or why there is none."""
    name, options = place
    try:
        return problem(mask, layouts.by_name(name, mask, world, ranks_per_node, **dict(options)))
    except UserError as error:
        return error


def _drop_needless(mask: Mask, posed: Posed) -> None:
    """Refuses a layout that equals another, and scattered chunks where long ranges balance."""
    for place, whole in posed.items():
        nodes = posed.get(("node_balanced", place[1]))
        if (
            place[0] == "hybrid"
            and isinstance(whole, Problem)
            and isinstance(nodes, Problem)
            and np.array_equal(whole.layout.ranges, nodes.layout.ranges)
        ):
            posed[place] = UserError(
                "layout hybrid", "equals node_balanced on this mask", "use node_balanced"
            )
    for name in ("contiguous", "zigzag"):
        plain = posed.get((name, ()))
        if isinstance(plain, Problem) and choice.imbalance(mask, plain.layout) <= choice.BALANCED:
            posed["area_greedy", ()] = UserError(
                "layout area_greedy", f"{name} balances the mask, in longer ranges", f"use {name}"
            )


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
    posed = problem.with_options(dict(candidate.options), candidate.wire)
    method = methods.by_name(candidate.method)
    forward = method.forward(posed)
    there = price(forward, terms.cluster, terms.kernel)
    curve = terms.cluster.kernel_named(terms.kernel).backward
    # Both directions compute the same tiles, and a joined forward a few keys twice.
    least = 0.0 if "join" in posed.options else least_backward(forward, curve)
    _pass_over(there.seconds + max(floor[1], least), best)
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
    choose = "choose another layout, method or settings"
    return UserError(
        f"no plan{limit}",
        f"all {len(refusals)} candidates are refused, {last.candidate} because {last.reason}",
        choose if terms.memory_limit is None else f"raise the limit, or {choose}",
    )

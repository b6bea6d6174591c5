"""What the planner weighs: combinations of layout, method and settings that can be best."""

from dataclasses import dataclass

from ringattn.schedule import Shapes, Wire

RANK_LAYOUTS = ("contiguous", "zigzag", "area_greedy")  # balance ranks
NODE_LAYOUTS = ("hybrid", "node_balanced")  # balance nodes, whose ranks share heads
AUTO_METHODS = (
    "ring", "direct", "double_ring", "burst", "tile", "all_gather", "ulysses", "usp", "loongtrain",
    "hybrid",
)  # fmt: skip
WIRES = (Wire.INPUT, Wire.ACCUMULATOR)
Options = tuple[tuple[str, int], ...]
LayoutOptions = tuple[tuple[str, int | float], ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run a mask: layout by name, method by name, settings of both.

    Attributes:
        layout, method: names. options: settings of the method.
        layout_options: settings of the layout.
        wire: dtype of travelling partial results; None for the caller's.
    """

    layout: str
    method: str
    options: Options = ()
    layout_options: LayoutOptions = ()
    wire: Wire | None = None

    @property
    def u(self) -> int:
        """Head-parallel degree; 1 where the settings do not say."""
        return dict(self.options).get("u", 1)

    @property
    def place(self) -> tuple[str, LayoutOptions]:
        """The layout with its settings."""
        return self.layout, self.layout_options

    def __str__(self) -> str:
        method, layout = (
            name + "".join(f", {key}={value}" for key, value in options)
            for name, options in ((self.method, self.options), self.place)
        )
        wire = "" if self.wire is None else f", {self.wire.name.lower()} on the wire"
        return f"{method} over {layout}{wire}"


def candidates(
    shapes: Shapes, world: int, ranks_per_node: int, layout: str = "auto", method: str = "auto"
) -> list[Candidate]:
    """What is worth pricing. A layout or method other than "auto" is kept to; settings are open."""
    degrees = _degrees(shapes, world, ranks_per_node)
    hybrids = [_entry("hybrid", u=u, stages=stages) for u in degrees for stages in (2, 1)]
    uneven = [_entry("hybrid", u=u, stages=2, slack=30) for u in degrees[:1]]
    shared = {name: [_entry(name, u=u) for u in degrees] for name in ("usp", "loongtrain")}
    if method != "auto":
        direct = [_entry("direct", stages=1, join=1), _entry("direct", stages=1), _entry("direct")]
        open_settings = {"hybrid": hybrids + uneven, "direct": direct, **shared}
        ways = open_settings.get(method) or [_entry(method)]
        names = (*RANK_LAYOUTS, *NODE_LAYOUTS) if layout == "auto" else (layout,)
        return [_candidate(name, entry, ranks_per_node) for name in names for entry in ways]
    plain = _plain(world > ranks_per_node)
    most = [entry for entry in hybrids if _u(entry) == degrees[0]]
    less = [entry for entry in hybrids if entry not in most and ("stages", 2) in entry[1]]
    # Where whole nodes share heads, the double ring inside is a ring; where not, it is better.
    rings = [e for e in shared["usp"][:1] if shapes.kv_heads % _u(e) == 0]
    rings += [e for e in shared["loongtrain"] if _u(e) < ranks_per_node][:1]
    whole = [_entry("ulysses", u=world)] if shapes.q_heads % world == 0 and world > 1 else []
    if layout != "auto":
        pairs = [(layout, entry) for entry in (*plain, *most, *uneven, *less, *rings, *whole)]
    else:
        pairs = [("hybrid", entry) for entry in (*most, *uneven)]
        pairs += [("node_balanced", entry) for entry in (*most, *less)]
        # Where few long ranges balance nodes, they do without scattered chunks.
        pairs += [(name, entry) for name in ("zigzag", "contiguous") for entry in most]
        pairs += [(name, entry) for name in ("node_balanced", "zigzag") for entry in rings]
        pairs += [(name, entry) for name in RANK_LAYOUTS for entry in plain]
        pairs += [("contiguous", entry) for entry in whole]
    return [_candidate(name, entry, ranks_per_node) for name, entry in pairs]


def _entry(method: str, **options: int) -> tuple[str, Options]:
    return method, tuple(options.items())


def _u(entry: tuple[str, Options]) -> int:
    return dict(entry[1]).get("u", 1)


def _candidate(layout: str, entry: tuple[str, Options], ranks_per_node: int) -> Candidate:
    """A candidate whose layout balances the ranks that share heads."""
    method, options = entry
    grouped = layout in NODE_LAYOUTS and 1 < _u(entry) < ranks_per_node
    return Candidate(
        layout=layout,
        method=method,
        options=options,
        layout_options=(("group", _u(entry)),) if grouped else (),
    )


def _plain(has_nodes: bool) -> list[tuple[str, Options]]:
    """Methods without head parallelism; direct in one stage, and in stages of a shard each."""
    found = [_entry("direct", stages=1, join=1), _entry("direct", stages=1), _entry("direct")]
    found.append(_entry("ring"))
    if has_nodes:
        found.append(_entry("double_ring"))
    # Burst rotates queries in the backward: fewer bytes where few queries attend remote keys.
    return [*found, _entry("burst"), _entry("tile"), _entry("all_gather")]


def _degrees(shapes: Shapes, world: int, ranks_per_node: int) -> list[int]:
    """Head-parallel degrees inside a node, largest first."""
    most = min(ranks_per_node, shapes.kv_heads, world)
    return [u for u in range(most, 1, -1) if ranks_per_node % u == 0 and world % u == 0]

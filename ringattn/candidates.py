"""What the planner weighs: combinations of layout, method and settings that can be best."""

from dataclasses import dataclass

from ringattn.schedule import Shapes

RANK_LAYOUTS = ("contiguous", "zigzag", "area_greedy")  # balance ranks
NODE_LAYOUTS = ("hybrid", "node_balanced")  # balance nodes, whose ranks share heads
AUTO_METHODS = ("ring", "direct", "double_ring", "burst", "ulysses", "usp", "hybrid")
BURST_RATIO = 1.5  # query heads per key head below which burst can receive less than ring
Options = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run a mask: layout by name, method by name, settings of the method."""

    layout: str
    method: str
    options: Options = ()

    @property
    def u(self) -> int:
        """Head-parallel degree; 1 where the settings do not say."""
        return dict(self.options).get("u", 1)

    def __str__(self) -> str:
        settings = "".join(f", {key}={value}" for key, value in self.options)
        return f"{self.method}{settings} over {self.layout}"


def candidates(
    shapes: Shapes, world: int, ranks_per_node: int, layout: str = "auto", method: str = "auto"
) -> list[Candidate]:
    """What is worth pricing. A layout or method other than "auto" is kept to."""
    if method != "auto":
        names = (*RANK_LAYOUTS, *NODE_LAYOUTS) if layout == "auto" else (layout,)
        return [Candidate(layout=name, method=method) for name in names]
    plain = _plain(shapes, world > ranks_per_node)
    degrees = _degrees(shapes, world, ranks_per_node)
    hybrids = [_entry("hybrid", u=u, stages=stages) for u in degrees for stages in (2, 1)]
    rings = [_entry("usp", u=u) for u in degrees if shapes.kv_heads % u == 0]
    whole = [_entry("ulysses", u=world)] if shapes.q_heads % world == 0 and world > 1 else []
    if layout != "auto":
        ways = [(layout, entry) for entry in (*plain, *hybrids, *rings, *whole)]
    else:
        ways = [(name, entry) for name in RANK_LAYOUTS for entry in plain]
        ways += [(name, entry) for name in NODE_LAYOUTS for entry in hybrids]
        # Where the mask is one long document, halves of it balance without scattered chunks.
        ways += [("zigzag", entry) for entry in hybrids[:2]]
        ways += [(name, entry) for name in ("node_balanced", "zigzag") for entry in rings]
        ways += [("contiguous", entry) for entry in whole]
    return [Candidate(layout=name, method=m, options=options) for name, (m, options) in ways]


def _entry(method: str, **options: int) -> tuple[str, Options]:
    return method, tuple(options.items())


def _plain(shapes: Shapes, has_nodes: bool) -> list[tuple[str, Options]]:
    """Methods without head parallelism; direct in one stage, and in stages of a shard each."""
    found = [_entry("direct", stages=1), _entry("direct"), _entry("ring")]
    if has_nodes:
        found.append(_entry("double_ring"))
    if shapes.q_heads < BURST_RATIO * shapes.kv_heads:
        found.append(_entry("burst"))
    return found


def _degrees(shapes: Shapes, world: int, ranks_per_node: int) -> list[int]:
    """Head-parallel degrees inside a node, largest first."""
    most = min(ranks_per_node, shapes.kv_heads, world)
    return [u for u in range(most, 1, -1) if ranks_per_node % u == 0 and world % u == 0]

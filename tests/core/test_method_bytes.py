"""Plan bytes against the published formulas, where they apply: full mask, equal shards."""

import pytest

from ringattn import Layout, layouts, masks
from ringattn.methods import METHODS
from ringattn.methods.common import Problem
from ringattn.schedule import Lane, Shapes, Wire

S, P, D, E = 64, 4, 8, 2  # tokens, ranks, head dim, bytes of an element
N = S // P
U = N * D


def _bytes(method: str, heads: tuple[int, int], wire: Wire, **changes) -> dict[str, list[int]]:
    mask = masks.full(S)
    layout: Layout = layouts.contiguous(S, P)
    shapes = Shapes(
        q_heads=heads[0], kv_heads=heads[1], qk_dim=D, v_dim=D, itemsize=E, accumulator_itemsize=4
    )
    options = changes.pop("options", {})
    problem = Problem(
        mask=mask, layout=layout, shapes=shapes, wire=wire, options=options,
        ranks_per_node=changes.pop("ranks_per_node", P),
    )  # fmt: skip
    found = {}
    for direction in ("forward", "backward"):
        schedule = getattr(METHODS[method], direction)(problem)
        found[direction] = [schedule.bytes(rank) for rank in range(P)]
    return found


WIRES = [(Wire.ACCUMULATOR, 4), (Wire.INPUT, 2)]
HEADS = [(8, 8), (8, 4)]


@pytest.mark.parametrize(("wire", "g"), WIRES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("method", ["ring", "all_gather", "direct"])
def test_key_moving_methods(method: str, heads: tuple[int, int], wire: Wire, g: int) -> None:
    found = _bytes(method, heads, wire)
    assert found["forward"] == [2 * (P - 1) * U * heads[1] * E] * P
    assert found["backward"] == [2 * (P - 1) * U * heads[1] * (E + g)] * P


@pytest.mark.parametrize(("wire", "g"), WIRES)
@pytest.mark.parametrize("heads", HEADS)
def test_burst(heads: tuple[int, int], wire: Wire, g: int) -> None:
    """(P-1) [u Hq (2e + g) + 8 n Hq] in the backward; less than the ring for few query heads."""
    found = _bytes("burst", heads, wire)
    assert found["forward"] == _bytes("ring", heads, wire)["forward"]
    assert found["backward"] == [(P - 1) * (U * heads[0] * (2 * E + g) + 8 * N * heads[0])] * P


@pytest.mark.parametrize(("wire", "g"), WIRES)
@pytest.mark.parametrize("heads", HEADS)
def test_ulysses(heads: tuple[int, int], wire: Wire, g: int) -> None:
    """The published forward plus 4 n Hq (U-1)/U for the lse that goes home with the output."""
    hq, hkv = heads
    found = _bytes("ulysses", heads, wire)
    share = (P - 1) / P
    assert found["forward"] == [int(share * (2 * U * (hq + hkv) * E + 4 * N * hq))] * P
    backward = share * (U * (hq * (2 * E + g) + 2 * hkv * (E + g)) + 8 * N * hq)
    assert found["backward"] == [int(backward)] * P


@pytest.mark.parametrize(("wire", "g"), WIRES)
@pytest.mark.parametrize("heads", HEADS)
def test_ulysses_that_saves(heads: tuple[int, int], wire: Wire, g: int) -> None:
    """The backward moves dout, dq, dk and dv only, with lse and delta: as the forward at g = e."""
    hq, hkv = heads
    found = _bytes("ulysses", heads, wire, options={"save": 1})
    share = (P - 1) / P
    assert found["forward"] == _bytes("ulysses", heads, wire)["forward"]
    backward = share * (U * (hq * (E + g) + 2 * hkv * g) + 8 * N * hq)
    assert found["backward"] == [int(backward)] * P


@pytest.mark.parametrize(("wire", "g"), WIRES)
@pytest.mark.parametrize("a", [1, 2, 4])
def test_tile_grid(a: int, wire: Wire, g: int) -> None:
    hq, hkv, b = 8, 4, P // a
    found = _bytes("tile", (hq, hkv), wire, options={"tile_a": a})
    forward = U * ((a - 1) * hq * (E + g) + 2 * (b - 1) * hkv * E) + 4 * (a - 1) * N * hq
    assert found["forward"] == [forward] * P
    backward = (a - 1) * (U * hq * (2 * E + g) + 8 * N * hq) + 2 * (b - 1) * U * hkv * (E + g)
    assert found["backward"] == [backward] * P


def test_tile_grid_chooses_the_cheapest_grid() -> None:
    for heads in HEADS:
        chosen = _bytes("tile", heads, Wire.INPUT)
        for a in (1, 2, 4):
            fixed = _bytes("tile", heads, Wire.INPUT, options={"tile_a": a})
            for direction in ("forward", "backward"):
                assert max(chosen[direction]) <= max(fixed[direction])


def test_double_ring_crosses_nodes_once_per_window() -> None:
    """2 (N-1) u Hkv e between nodes, the ring's total over both lanes."""
    shapes = Shapes(q_heads=8, kv_heads=4, qk_dim=D, v_dim=D, itemsize=E, accumulator_itemsize=4)
    problem = Problem(
        mask=masks.full(S), layout=layouts.contiguous(S, P), shapes=shapes, ranks_per_node=2
    )
    schedule = METHODS["double_ring"].forward(problem)
    for rank in range(P):
        assert schedule.bytes(rank) == 2 * (P - 1) * U * 4 * E
        assert schedule.bytes(rank, Lane.INTER) == 2 * (2 - 1) * U * 4 * E
    crossing = schedule.moves[schedule.moves["lane"] == Lane.INTER]
    assert (crossing["land"] - crossing["post"] == 1).all()  # a window of two steps


@pytest.mark.parametrize("u", [2, 4])
def test_usp_is_ulysses_around_a_ring(u: int) -> None:
    hq, hkv, r = 8, 4, P // u
    found = _bytes("usp", (hq, hkv), Wire.INPUT, options={"u": u})
    spread = (u - 1) / u * (2 * U * (hq + hkv) * E + 4 * N * hq)
    ring = 2 * (r - 1) * (u * U) * (hkv // u) * E
    assert found["forward"] == [int(spread + ring)] * P

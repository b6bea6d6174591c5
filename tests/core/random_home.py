"""Results at home in a random plan: rows that travel and come back, SETs that come first."""

import numpy as np

from ringattn.schedule import Channel, Direction, Op
from tests.core.random_memory import Life
from tests.core.random_routes import Part, Routes


def add_tour(routes: Routes, tasks: np.ndarray) -> None:
    """Some rows of a result leave home and come back later, where nothing touches them meanwhile.

    Args:
        routes: the plan's other moves; the tour's are added.
        tasks: the plan's tasks.
    """
    rng, forward = routes.rng, routes.direction == "forward"
    channel = Channel.O if forward else (Channel.DQ, Channel.DKV)[int(rng.integers(2))]
    home = routes.home(channel, int(rng.integers(routes.problem.world)))
    if not home.rows:
        return
    first, last = sorted(int(r) for r in rng.choice(home.rows + 1, 2, replace=False))
    low, high = sorted(int(h) for h in rng.choice(len(home.head_map) + 1, 2, replace=False))
    away = Life(channel, home.owner, first, last - first, tuple(range(low, high)))
    there, back = (
        sorted(int(t) for t in rng.integers(*span, 2)) for span in routes.spans(0, routes.nsteps, 2)
    )
    out = Part(first, last - first, low, away.head, high - low, *there)
    home_again = Part(first, last - first, away.head, low, high - low, *back)
    if not _is_quiet(out, home, routes.moves(), tasks):
        return
    op = Op(int(rng.integers(2)))
    away.fills.append((out.post, out.land, int(op)))
    away.leaves.append((home_again.post, home_again.land))
    routes.place([away])
    routes.emit(home, away, [out], op, take=True)
    routes.emit(away, home, [home_again], Op.ADD, take=True)


def _is_quiet(out: Part, home: Life, moves: np.ndarray, tasks: np.ndarray) -> bool:
    """Whether these rows of home are at rest while they leave, and leave only once."""
    rank, channel, _ = home.place
    writes = _home_writes(tasks, rank, channel, out.first, out.first + out.rows)
    if ((out.post <= writes) & (writes <= out.land)).any():
        return False
    heads = out.src_head, out.src_head + out.heads
    rows = out.first, out.first + out.rows
    landing = _touching(moves, "dst", rank, channel, rows, heads)
    leaving = _touching(moves, "src", rank, channel, rows, heads)
    busy = landing & (moves["land"] >= out.post) & (moves["land"] < out.land)
    return not (busy | leaving).any()


def set_some(
    moves: np.ndarray, tasks: np.ndarray, direction: Direction, rng: np.random.Generator
) -> None:
    """Makes SETs of some results that come home before anything else does, in place."""
    results = (Channel.O,) if direction == "forward" else (Channel.DQ, Channel.DKV)
    for m in moves:
        if m["dslot"] or m["channel"] not in results or rng.random() < 0.5:
            continue
        rank, channel, land = int(m["dst"]), int(m["channel"]), int(m["land"])
        rows, heads = (m["d0"], m["d0"] + m["rows"]), (m["dh"], m["dh"] + m["nheads"])
        if (_home_writes(tasks, rank, channel, *rows) <= land).any():
            continue
        others = _touching(moves, "dst", rank, channel, rows, heads)
        sooner = moves["land"] < land
        sooner |= (moves["land"] == land) & (moves["op"] == Op.SET)
        leaving = _touching(moves, "src", rank, channel, rows, heads)
        if not (others & sooner).any() and not leaving.any():
            m["op"] = Op.SET


def _home_writes(tasks: np.ndarray, rank: int, channel: int, r0: int, r1: int) -> np.ndarray:
    """Steps in which tasks add to rows [r0, r1) of a result at home."""
    slot, axis = ("gslot", "k") if channel == Channel.DKV else ("oslot", "q")
    mine = (tasks["rank"] == rank) & (tasks[slot] == 0)
    mine &= (tasks[axis + "0"] < r1) & (tasks[axis + "1"] > r0)
    return tasks["step"][mine]


def _touching(
    moves: np.ndarray, end: str, rank: int, channel: int, rows: tuple, heads: tuple
) -> np.ndarray:
    """Which moves have an end in these cells of a home slot."""
    slot, row, head = ("dslot", "d0", "dh") if end == "dst" else ("sslot", "s0", "sh")
    touch = (moves[end] == rank) & (moves["channel"] == channel) & (moves[slot] == 0)
    touch &= (moves[row] < rows[1]) & (moves[row] + moves["rows"] > rows[0])
    return touch & (moves[head] < heads[1]) & (moves[head] + moves["nheads"] > heads[0])

"""The timing rules of moves: who may touch which rows while a move is under way."""

import numpy as np

from ringattn.bands import ceil_div, expand_ranges
from ringattn.bounds import SlotSizes
from ringattn.errors import PlanError
from ringattn.schedule import ACCUMULATORS, Channel, Op, Schedule


def check_races(schedule: Schedule) -> None:
    """Checks the timing rules of moves.

    A source is written by no task from `post` to `land` and by no landing from `post` until
    `land`; the target of a SET is read by no task or later capture in [post, land].
    """
    moves = schedule.moves
    if (moves["post"] > moves["land"]).any() or (moves["land"] >= schedule.nsteps).any():
        raise PlanError("a move lands before it is posted, or after the last step")
    accumulates = np.isin(moves["channel"], ACCUMULATORS)
    source = _accesses(moves, "src", "sslot", "s0", moves["post"], moves["land"])
    target = _accesses(moves, "dst", "dslot", "d0", moves["land"], moves["land"])
    written = np.concatenate([_task_accesses(schedule, c) for c in ACCUMULATORS])
    read = np.concatenate([_task_accesses(schedule, c) for c in (Channel.Q, Channel.K)])
    _refuse_overlap(source[accumulates], written, "a task writes a move's source in flight")
    landing = source.copy()
    landing["t1"] -= 1
    _refuse_overlap(landing, target, "a landing overwrites a move's source in flight")
    sets = target[moves["op"] == Op.SET].copy()
    sets["t0"] = moves["post"][moves["op"] == Op.SET]
    _refuse_overlap(sets, read, "a task reads rows that a SET fills")
    captures = source.copy()
    captures["t1"] = captures["t0"]
    sets["t0"] += 1
    _refuse_overlap(sets, captures, "a move captures rows that a SET fills")


_ACCESS = np.dtype([(n, np.int64) for n in ("place", "r0", "r1", "h0", "h1", "t0", "t1")])


def _place(rank, channel, slot) -> np.ndarray:
    return (np.asarray(rank) * 8 + channel) * (1 << 20) + slot


def _accesses(moves: np.ndarray, rank: str, slot: str, row: str, t0, t1) -> np.ndarray:
    table = np.empty(len(moves), dtype=_ACCESS)
    head = "sh" if rank == "src" else "dh"
    table["place"] = _place(moves[rank], moves["channel"], moves[slot])
    table["r0"], table["r1"] = moves[row], moves[row] + moves["rows"]
    table["h0"], table["h1"] = moves[head], moves[head] + moves["nheads"]
    table["t0"], table["t1"] = t0, t1
    return table


def _task_accesses(schedule: Schedule, channel: Channel) -> np.ndarray:
    """Rows and heads of a channel that each task reads or adds to."""
    slot, rows = {
        Channel.Q: ("qslot", "q"),
        Channel.K: ("kslot", "k"),
        Channel.O: ("oslot", "q"),
        Channel.DQ: ("oslot", "q"),
        Channel.DKV: ("gslot", "k"),
    }[channel]
    absent = (Channel.DQ, Channel.DKV) if schedule.direction == "forward" else (Channel.O,)
    part = schedule.tasks[:0] if channel in absent else schedule.tasks
    table = np.empty(len(part), dtype=_ACCESS)
    table["place"] = _place(part["rank"], int(channel), part[slot])
    table["r0"], table["r1"] = part[rows + "0"], part[rows + "1"]
    ratio = 1
    if rows == "k":
        sizes = SlotSizes.of(schedule)
        _, queries = sizes.at(part["rank"], Channel.Q, part["qslot"])
        _, keys = sizes.at(part["rank"], int(channel), part[slot])
        ratio = np.maximum(queries // keys, 1)
    table["h0"], table["h1"] = part["h0"] // ratio, ceil_div(part["h1"], ratio)
    table["t0"] = table["t1"] = part["step"]
    return table


def _refuse_overlap(a: np.ndarray, b: np.ndarray, message: str) -> None:
    """Raises when an access of a and one of b share a place, rows, heads and time."""
    b = b[np.argsort(b["place"], kind="stable")]
    which, other = expand_ranges(
        np.searchsorted(b["place"], a["place"], side="left"),
        np.searchsorted(b["place"], a["place"], side="right"),
    )
    x, y = a[which], b[other]
    clash = np.ones(len(x), dtype=bool)
    for low, high in (("r0", "r1"), ("h0", "h1")):
        clash &= (x[low] < y[high]) & (y[low] < x[high])
    clash &= (x["t0"] <= y["t1"]) & (y["t0"] <= x["t1"])
    if clash.any():
        first = x[np.flatnonzero(clash)[0]]
        rank, step = int(first["place"]) >> 23, int(first["t0"])
        raise PlanError(f"rank {rank}, step {step}: {message}")

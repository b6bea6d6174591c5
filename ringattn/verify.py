"""The symbolic verifier: runs a plan on integers and compares every row exactly.

Rows carry token and head ids instead of vectors. A query row has a random weight u, a key row a
random weight w (both functions of the id, modulo 2**64); the kernel adds u * sum of w over the
allowed keys to the output row, and u * w to the gradients. A plan is right iff every home row ends
with the sum that the mask gives. Coverage by area alone would miss rows that swap places.
"""

from dataclasses import dataclass

import numpy as np

from ringattn.bands import ceil_div, expand_ranges
from ringattn.errors import PlanError
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.plan import Plan
from ringattn.schedule import Channel, Op, Schedule, bands_of

_HEAD = 1 << 12  # more than any head count: id = token * _HEAD + head
ACCUMULATORS = (Channel.O, Channel.DQ, Channel.DKV)


def _weight(ids: np.ndarray, salt: int) -> np.ndarray:
    """A fixed pseudo-random odd-mixing hash of ids to uint64 (splitmix64's finaliser)."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (salt + 1) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _window_sums(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Sum of rows [first, last) of values, per column, modulo 2**64."""
    prefix = np.zeros((len(values) + 1, values.shape[1]), dtype=np.uint64)
    np.cumsum(values, axis=0, out=prefix[1:])
    last = np.maximum(last, first)
    return prefix[last] - prefix[first]


def _band_sums(band: np.void, u: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For one band over rows of u (queries) and w (keys), one column per head pair:
    sum of w over each query's keys, and sum of u over each key's queries."""
    step, q0, k0 = (int(band[n]) for n in ("step", "q0", "k0"))
    nq, nk = len(u), len(w)
    lo = ceil_div(int(band["lo"]) - (k0 - q0), step)
    hi = (int(band["hi"]) - (k0 - q0)) // step
    a, b = np.arange(nq), np.arange(nk)
    rows = _window_sums(w, np.clip(a + lo, 0, nk), np.clip(a + hi + 1, 0, nk))
    columns = _window_sums(u, np.clip(b - hi, 0, nq), np.clip(b - lo + 1, 0, nq))
    return rows, columns


@dataclass
class _State:
    """Ids or accumulated integers of every slot of every rank."""

    schedule: Schedule
    buffers: dict[tuple[int, int, int], np.ndarray]

    def at(self, rank: int, channel: int, slot: int) -> np.ndarray:
        key = (rank, channel, slot)
        if key not in self.buffers:
            raise PlanError(f"rank {rank}: slot {slot} of {Channel(channel).name} does not exist")
        return self.buffers[key]


def _start(schedule: Schedule, layout: Layout) -> _State:
    shapes, buffers = schedule.shapes, {}
    forward = schedule.direction == "forward"
    channels = (
        (Channel.Q, Channel.K, Channel.O) if forward else tuple(Channel)[:2] + tuple(Channel)[3:]
    )
    for rank in range(schedule.world):
        tokens = layout.positions(rank)
        for channel in channels:
            heads = shapes.heads(channel)
            if channel in ACCUMULATORS:
                buffers[rank, channel, 0] = np.zeros((len(tokens), heads), dtype=np.uint64)
            else:
                buffers[rank, channel, 0] = tokens[:, None] * _HEAD + np.arange(heads)
    for rank, channel, slot, rows, heads in (tuple(int(x) for x in s) for s in schedule.slots):
        if channel in ACCUMULATORS:
            buffers[rank, channel, slot] = np.zeros((rows, heads), dtype=np.uint64)
        else:
            buffers[rank, channel, slot] = np.full((rows, heads), -1, dtype=np.int64)
    return _State(schedule, buffers)


def _rows(band: np.void) -> tuple[slice, slice]:
    """Query rows and key rows of a band."""
    q0, q1, k0, k1, step = (int(band[name]) for name in ("q0", "q1", "k0", "k1", "step"))
    return slice(q0, q1, step), slice(k0, k1, step)


def _read(buffer: np.ndarray, rows: slice, heads: np.ndarray, what: str) -> np.ndarray:
    ids = buffer[rows][:, heads]
    if (ids < 0).any():
        raise PlanError(f"{what} reads rows that nothing filled")
    return ids


def _compute(state: _State, task: np.void, band: np.void) -> None:
    shapes, rank = state.schedule.shapes, int(task["rank"])
    q_buffer = state.at(rank, Channel.Q, int(task["qslot"]))
    k_buffer = state.at(rank, Channel.K, int(task["kslot"]))
    group = q_buffer.shape[1] // k_buffer.shape[1]
    heads = np.arange(task["h0"], task["h1"])
    q_rows, k_rows = _rows(band)
    what = f"rank {rank}, step {task['step']}: task"
    q_ids = _read(q_buffer, q_rows, heads, what)
    k_ids = _read(k_buffer, k_rows, heads // group, what)
    ratio = shapes.q_heads // shapes.kv_heads
    if (q_ids[0] % _HEAD // ratio != k_ids[0] % _HEAD).any():
        raise PlanError(f"{what} pairs query heads with key heads of another group")
    u, w = _weight(q_ids, 0), _weight(k_ids, 1)
    rows, columns = _band_sums(band, u, w)
    if state.schedule.direction == "forward":
        state.at(rank, Channel.O, int(task["oslot"]))[q_rows, task["h0"] : task["h1"]] += u * rows
        return
    state.at(rank, Channel.DQ, int(task["oslot"]))[q_rows, task["h0"] : task["h1"]] += u * rows
    gradient = state.at(rank, Channel.DKV, int(task["gslot"]))[k_rows]
    np.add.at(gradient.T, heads // group, (w * columns).T)


def _land(
    state: _State, moves: np.ndarray, payloads: dict[int, np.ndarray], landing: np.ndarray
) -> None:
    for index in landing:
        m = moves[index]
        if m["take"]:
            buffer = state.at(int(m["src"]), int(m["channel"]), int(m["sslot"]))
            buffer[m["s0"] : m["s0"] + m["rows"], m["sh"] : m["sh"] + m["nheads"]] = 0
    for op in (Op.SET, Op.ADD):
        for index in landing:
            m = moves[index]
            if m["op"] != op:
                continue
            buffer = state.at(int(m["dst"]), int(m["channel"]), int(m["dslot"]))
            target = buffer[m["d0"] : m["d0"] + m["rows"], m["dh"] : m["dh"] + m["nheads"]]
            if target.shape != payloads[index].shape:
                raise PlanError(f"move {index} does not fit its destination slot")
            if op == Op.SET:
                target[...] = payloads[index]
            else:
                target += payloads[index]


def verify_schedule(schedule: Schedule, mask: Mask, layout: Layout) -> None:
    """Checks that a schedule computes exactly the mask's attention (or its gradients).

    Raises:
        PlanError: a rule of the schedule is broken, or a row ends with the wrong sum.
    """
    check_races(schedule)
    state, moves, tasks = _start(schedule, layout), schedule.moves, schedule.tasks
    bands = bands_of(tasks)
    payloads: dict[int, np.ndarray] = {}
    for step in range(schedule.nsteps):
        for index in np.flatnonzero(moves["post"] == step):
            m = moves[index]
            buffer = state.at(int(m["src"]), int(m["channel"]), int(m["sslot"]))
            part = buffer[m["s0"] : m["s0"] + m["rows"], m["sh"] : m["sh"] + m["nheads"]].copy()
            if part.shape != (m["rows"], m["nheads"]):
                raise PlanError(f"move {index} reads beyond its source slot")
            payloads[int(index)] = part
        for index in np.flatnonzero(tasks["step"] == step):
            _compute(state, tasks[index], bands[index])
        _land(state, moves, payloads, np.flatnonzero(moves["land"] == step))
    _check_home(state, mask, layout)


def _check_home(state: _State, mask: Mask, layout: Layout) -> None:
    shapes, tokens = state.schedule.shapes, np.arange(mask.seq_len)
    q_ids = tokens[:, None] * _HEAD + np.arange(shapes.q_heads)
    ratio = shapes.q_heads // shapes.kv_heads
    kv_of_head = np.arange(shapes.q_heads) // ratio
    k_ids = tokens[:, None] * _HEAD + np.arange(shapes.kv_heads)
    u, w = _weight(q_ids, 0), _weight(k_ids, 1)
    by_query = np.zeros_like(u)
    by_key = np.zeros_like(w)
    for band in mask.bands:
        q_rows, k_rows = _rows(band)
        rows, columns = _band_sums(band, u[q_rows], w[k_rows][:, kv_of_head])
        by_query[q_rows] += rows
        np.add.at(by_key[k_rows].T, kv_of_head, columns.T)
    expected = {Channel.O: u * by_query, Channel.DQ: u * by_query, Channel.DKV: w * by_key}
    forward = state.schedule.direction == "forward"
    for channel in (Channel.O,) if forward else (Channel.DQ, Channel.DKV):
        for rank in range(layout.world):
            got, want = state.at(rank, channel, 0), expected[channel][layout.positions(rank)]
            wrong = np.argwhere(got != want)
            if len(wrong):
                raise PlanError(
                    f"{state.schedule.direction}: rank {rank} ends with wrong {channel.name} at "
                    f"row {wrong[0][0]}, head {wrong[0][1]} ({len(wrong)} entries wrong)"
                )


def check_races(schedule: Schedule) -> None:
    """Checks the timing rules of moves.

    A source is written by no task from `post` to `land` and by no landing from `post` until
    `land`; the target of a SET is read by no task or later capture in [post, land].
    """
    moves, tasks = schedule.moves, schedule.tasks
    if (moves["post"] > moves["land"]).any() or (moves["land"] >= schedule.nsteps).any():
        raise PlanError("a move lands before it is posted, or after the last step")
    accumulates = np.isin(moves["channel"], ACCUMULATORS)
    source = _accesses(moves, "src", "sslot", "s0", moves["post"], moves["land"])
    target = _accesses(moves, "dst", "dslot", "d0", moves["land"], moves["land"])
    written = np.concatenate([_task_accesses(tasks, c, schedule.direction) for c in ACCUMULATORS])
    read = np.concatenate(
        [_task_accesses(tasks, c, schedule.direction) for c in (Channel.Q, Channel.K)]
    )
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


def _task_accesses(tasks: np.ndarray, channel: Channel, direction: str) -> np.ndarray:
    slot, rows = {
        Channel.Q: ("qslot", "q"),
        Channel.K: ("kslot", "k"),
        Channel.O: ("oslot", "q"),
        Channel.DQ: ("oslot", "q"),
        Channel.DKV: ("gslot", "k"),
    }[channel]
    absent = (
        channel == Channel.O if direction == "backward" else channel in (Channel.DQ, Channel.DKV)
    )
    part = tasks[:0] if absent else tasks
    table = np.empty(len(part), dtype=_ACCESS)
    table["place"] = _place(part["rank"], int(channel), part[slot])
    table["r0"], table["r1"] = part[rows + "0"], part[rows + "1"]
    table["h0"], table["h1"] = 0, _HEAD
    if rows == "q":  # heads of keys and queries are counted apart
        table["h0"], table["h1"] = part["h0"], part["h1"]
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


def verify(plan: Plan) -> None:
    """Proves both schedules of a plan on integers. Raises PlanError with the first difference."""
    for schedule in (plan.forward, plan.backward):
        verify_schedule(schedule, plan.mask, plan.layout)

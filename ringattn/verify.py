"""The symbolic verifier: runs a plan on integers and compares every row exactly.

Rows carry token and head ids instead of vectors. A query row has a random weight u, a key row a
random weight w (both functions of the id, modulo 2**64); the kernel adds u * sum of w over the
allowed keys to the output row, and u * w to the gradients. Outputs at home start from a third
weight, as they may from a sink. A plan is right iff every home row ends with the sum that the mask
gives. Coverage by area alone would miss rows that swap places.
"""

from dataclasses import dataclass

import numpy as np

from ringattn.bands import BAND_FIELDS, ceil_div
from ringattn.bounds import check_bounds
from ringattn.checks import is_plan
from ringattn.errors import PlanError
from ringattn.kernels.block_matrix import BLOCK_TILE, BlockMatrix, allowed_pairs
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.plan import Plan
from ringattn.races import check_races
from ringattn.schedule import ACCUMULATORS, Channel, Op, Schedule, bands_of

_SINK = 2  # salt of the weights that outputs at home start from
_WAITING = -2  # less an id: the row's saved tensors are there, the others are not
_HEAD = 1 << 12  # more than any head count: id = token * _HEAD + head


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


def _sums(
    tile: np.void, matrix: BlockMatrix | None, band: np.void, u: np.ndarray, w: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`_band_sums` of a tile, of which only allowed blocks count where it has a matrix."""
    if matrix is None:
        return _band_sums(band, u, w)
    allowed = allowed_pairs(tile, matrix).astype(np.uint64)
    return allowed @ w, allowed.T @ u


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


def _start(schedule: Schedule, layout: Layout, saved: _State | None) -> _State:
    shapes, buffers = schedule.shapes, {}
    forward = schedule.direction == "forward"
    channels = (
        (Channel.Q, Channel.K, Channel.O) if forward else tuple(Channel)[:2] + tuple(Channel)[3:]
    )
    for rank in range(schedule.world):
        tokens = layout.positions(rank)
        for channel in channels:
            heads = shapes.heads(channel)
            ids = tokens[:, None] * _HEAD + np.arange(heads)
            if channel == Channel.O:  # may hold a sink from the start, which must stay
                buffers[rank, channel, 0] = _weight(ids, _SINK)
            elif channel in ACCUMULATORS:
                buffers[rank, channel, 0] = np.zeros((len(tokens), heads), dtype=np.uint64)
            else:
                buffers[rank, channel, 0] = ids
    for rank, channel, slot, rows, heads in (tuple(int(x) for x in s) for s in schedule.slots):
        if channel in ACCUMULATORS:
            buffers[rank, channel, slot] = np.zeros((rows, heads), dtype=np.uint64)
        else:
            buffers[rank, channel, slot] = np.full((rows, heads), -1, dtype=np.int64)
            if not forward and (channel, slot) in schedule.saved:
                if saved is None:
                    raise PlanError("a backward that starts from saved slots needs its forward")
                ids = saved.at(rank, channel, slot)
                # Queries wait for dout, lse and delta of their rows.
                ids = np.where(ids < 0, ids, _WAITING - ids) if channel == Channel.Q else ids
                buffers[rank, channel, slot] = ids.copy()
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
    matrix = None if task["matrix"] < 0 else state.schedule.matrices[task["matrix"]]
    if matrix is not None and (q_ids[0] % _HEAD != np.arange(len(heads)) + task["head"]).any():
        raise PlanError(f"{what} names other heads than its rows have")
    rows, columns = _sums(task, matrix, band, u, w)
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
                if m["skip"] and (target != _WAITING - payloads[index]).any():
                    raise PlanError(f"move {index} skips what its destination does not hold")
                target[...] = payloads[index]
            else:
                target += payloads[index]


def verify_schedule(
    schedule: Schedule, mask: Mask, layout: Layout, forward: "_State | None" = None
) -> "_State":
    """Checks that a schedule computes exactly the mask's attention (or its gradients).

    Args:
        schedule: of `mask` over `layout`.
        forward: what this function returned for the forward, for a backward that starts from slots
            which the forward saved.

    Returns:
        The slots at the end.

    Raises:
        PlanError: a rule of the schedule is broken, or a row ends with the wrong sum.
    """
    check_bounds(schedule)
    check_races(schedule)
    state, moves, tasks = _start(schedule, layout, forward), schedule.moves, schedule.tasks
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
    return state


def _check_home(state: _State, mask: Mask, layout: Layout) -> None:
    shapes, tokens = state.schedule.shapes, np.arange(mask.seq_len)
    q_ids = tokens[:, None] * _HEAD + np.arange(shapes.q_heads)
    ratio = shapes.q_heads // shapes.kv_heads
    kv_of_head = np.arange(shapes.q_heads) // ratio
    k_ids = tokens[:, None] * _HEAD + np.arange(shapes.kv_heads)
    u, w = _weight(q_ids, 0), _weight(k_ids, 1)
    by_query = np.zeros_like(u)
    by_key = np.zeros_like(w)
    first, last = mask.band_heads(shapes.q_heads)
    for index, band in enumerate(mask.bands):
        q_rows, k_rows = _rows(band)
        heads = np.arange(first[index], last[index])
        tile, matrix = _whole_tile(mask, index)
        own = w[k_rows][:, kv_of_head[heads]]
        rows, columns = _sums(tile, matrix, band, u[q_rows][:, heads], own)
        by_query[q_rows, heads[0] : heads[-1] + 1] += rows
        np.add.at(by_key[k_rows].T, kv_of_head[heads], columns.T)
    out = u * by_query + _weight(q_ids, _SINK)
    expected = {Channel.O: out, Channel.DQ: u * by_query, Channel.DKV: w * by_key}
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


def _whole_tile(mask: Mask, index: int) -> tuple[np.void, BlockMatrix | None]:
    """A band of the mask as a tile over all tokens, and its matrix."""
    tile = np.zeros(1, dtype=BLOCK_TILE)
    for name in BAND_FIELDS:
        tile[name] = mask.bands[index][name]
    tile["pitch"] = 1
    number = int(mask.matrix[index])
    return tile[0], mask.matrices[number] if number >= 0 else None


def verify(plan: Plan) -> None:
    """Proves both schedules of a plan on integers. Raises PlanError with the first difference."""
    is_plan(plan)
    forward = verify_schedule(plan.forward, plan.mask, plan.layout)
    verify_schedule(plan.backward, plan.mask, plan.layout, forward)

"""One random change to a schedule, that most likely breaks it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ringattn.schedule import Op, Schedule

Table = np.ndarray
Row = tuple[str, int]  # which table, which row


def random_fault(schedule: Schedule, rng: np.random.Generator) -> tuple[str, Schedule]:
    """The schedule with one row of one table changed, dropped or repeated, and what was done."""
    names = [n for n in ("tasks", "moves") if len(getattr(schedule, n))]
    name = names[int(rng.integers(len(names)))]
    table = getattr(schedule, name).copy()
    row = int(rng.integers(len(table)))
    kind = int(rng.integers(8))
    if kind == 0:
        return f"{name} {row} lost", replace(schedule, **{name: np.delete(table, row)})
    if kind == 1:
        twice = np.concatenate([table, table[row : row + 1]])
        return f"{name} {row} twice", replace(schedule, **{name: twice})
    changes = TASK_CHANGES if name == "tasks" else MOVE_CHANGES
    what = list(changes)[int(rng.integers(len(changes)))]
    before = table[row].copy()
    changes[what](schedule, table[row], rng)
    after = [f"{n} {before[n]} to {table[row][n]}" for n in table.dtype.names or ()
             if before[n] != table[row][n]]  # fmt: skip
    return f"{name} {row}, {what}: {', '.join(after)}", replace(schedule, **{name: table})


def _by_one(*columns: str) -> Callable[[Schedule, np.void, np.random.Generator], None]:
    """Shifts columns together by one, not below zero."""

    def change(schedule: Schedule, row: np.void, rng: np.random.Generator) -> None:
        del schedule
        shift = 1 if min(row[c] for c in columns) == 0 or rng.random() < 0.5 else -1
        for column in columns:
            row[column] += shift

    return change


def _edge(*columns: str) -> Callable[[Schedule, np.void, np.random.Generator], None]:
    """Moves one of the columns by one."""

    def change(schedule: Schedule, row: np.void, rng: np.random.Generator) -> None:
        _by_one(columns[int(rng.integers(len(columns)))])(schedule, row, rng)

    return change


def _later(*columns: str) -> Callable[[Schedule, np.void, np.random.Generator], None]:
    """Another step for one of the columns."""

    def change(schedule: Schedule, row: np.void, rng: np.random.Generator) -> None:
        column = columns[int(rng.integers(len(columns)))]
        row[column] = int(rng.integers(schedule.nsteps))

    return change


def _rank(*columns: str) -> Callable[[Schedule, np.void, np.random.Generator], None]:
    """Another rank."""

    def change(schedule: Schedule, row: np.void, rng: np.random.Generator) -> None:
        row[columns[int(rng.integers(len(columns)))]] = int(rng.integers(schedule.world))

    return change


def _slot(*columns: str) -> Callable[[Schedule, np.void, np.random.Generator], None]:
    """Another slot, often home."""

    def change(schedule: Schedule, row: np.void, rng: np.random.Generator) -> None:
        column = columns[int(rng.integers(len(columns)))]
        row[column] = 0 if rng.random() < 0.5 else int(rng.integers(row[column] + 2))

    return change


def _flip(column: str) -> Callable[[Schedule, np.void, np.random.Generator], None]:
    def change(schedule: Schedule, row: np.void, rng: np.random.Generator) -> None:
        del schedule, rng
        row[column] = 1 - row[column]

    return change


def _other_op(schedule: Schedule, row: np.void, rng: np.random.Generator) -> None:
    del schedule, rng
    row["op"] = Op.SET if row["op"] == Op.ADD else Op.ADD


TASK_CHANGES = {
    "another step": _later("step"),
    "another rank": _rank("rank"),
    "another slot": _slot("qslot", "kslot", "oslot", "gslot"),
    "another diagonal": _edge("lo", "hi"),
    "other rows": _edge("q0", "q1", "k0", "k1"),
    "rows one on": _by_one("q0", "q1"),
    "keys one on": _by_one("k0", "k1"),
    "heads one on": _by_one("h0", "h1"),
    "other heads": _edge("h0", "h1"),
}
MOVE_CHANGES = {
    "another time": _later("post", "land"),
    "another rank": _rank("src", "dst"),
    "another slot": _slot("sslot", "dslot"),
    "rows one on": _edge("s0", "d0"),
    "other rows": _edge("rows"),
    "heads one on": _edge("sh", "dh"),
    "other heads": _edge("nheads"),
    "the other op": _other_op,
    "taken or not": _flip("take"),
}

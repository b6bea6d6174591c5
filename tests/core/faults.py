"""Deliberate faults: each function patches one thing in the library until the patch is undone."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ringattn import executor, layouts, masks, program
from ringattn.kernels import matmul
from ringattn.methods import METHODS, head_groups, rotation
from ringattn.methods import heads as head_slicing
from ringattn.schedule import Channel, Op, Schedule, Shapes

Patch = pytest.MonkeyPatch
simulate = importlib.import_module("ringattn.simulate")  # the package's name is the function


def _wrap(patch: Patch, module: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces module.name by change(original, *arguments)."""
    original = getattr(module, name)
    patch.setattr(module, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def _merge(patch: Patch, merge: Callable[..., None]) -> None:
    """Replaces the merge wherever it is used."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ringattn.") and hasattr(module, "merge_partial"):
            patch.setattr(module, "merge_partial", merge)


def merge_without_weights(patch: Patch) -> None:
    def merge(out, lse, part_out, part_lse) -> None:
        out.add_(part_out).mul_(0.5)
        torch.logaddexp(lse, part_lse, out=lse)

    _merge(patch, merge)


def merge_with_the_larger_lse(patch: Patch) -> None:
    def merge(out, lse, part_out, part_lse) -> None:
        weight = torch.sub(part_lse, lse).sigmoid().masked_fill(part_lse == -torch.inf, 0.0)
        out.lerp_(part_out, weight.unsqueeze(-1))
        torch.maximum(lse, part_lse, out=lse)

    _merge(patch, merge)


def merge_of_two_empty_sides(patch: Patch) -> None:
    def merge(out, lse, part_out, part_lse) -> None:
        out.lerp_(part_out, torch.sub(part_lse, lse).sigmoid().unsqueeze(-1))
        torch.logaddexp(lse, part_lse, out=lse)

    _merge(patch, merge)


def _change_parts(patch: Patch, change: Callable[[program.Part, bool], program.Part]) -> None:
    """Changes every part of every message of a program: change(part, it is sent)."""

    def messages(original, moves, members, *, send):
        return tuple(
            replace(message, parts=tuple(change(part, send) for part in message.parts))
            for message in original(moves, members, send=send)
        )

    _wrap(patch, program, "_messages", messages)


class _AddFirst(IntEnum):
    ADD = 1
    SET = 2


def adds_land_before_sets(patch: Patch) -> None:
    names = {int(Op.ADD): _AddFirst.ADD, int(Op.SET): _AddFirst.SET}
    patch.setattr(executor, "Op", _AddFirst)
    _change_parts(patch, lambda part, send: replace(part, op=int(names[part.op])))


def taken_sources_are_not_cleared(patch: Patch) -> None:
    _change_parts(patch, lambda part, send: replace(part, take=False))


def heads_land_in_the_other_half(patch: Patch) -> None:
    def change(part: program.Part, send: bool) -> program.Part:
        if send or part.key[0] != Channel.O:
            return part
        return replace(part, heads=slice(0, 2) if part.heads.start else slice(2, 4))

    _change_parts(patch, change)


def rows_land_one_lower(patch: Patch) -> None:
    def change(part: program.Part, send: bool) -> program.Part:
        if send or part.key[0] != Channel.K or not part.rows.start:
            return part
        return replace(part, rows=slice(part.rows.start - 1, part.rows.stop - 1))

    _change_parts(patch, change)


def _change_schedules(patch: Patch, change: Callable[[np.ndarray, np.ndarray], tuple]) -> None:
    """Changes the tables of every plan: change(tasks, moves) returns both."""

    def changed(generate: Callable[..., Schedule], problem: Any) -> Schedule:
        schedule = generate(problem)
        tasks, moves = change(schedule.tasks.copy(), schedule.moves.copy())
        return replace(schedule, tasks=tasks, moves=moves)

    for name, method in list(METHODS.items()):
        forward, backward = partial(changed, method.forward), partial(changed, method.backward)
        patch.setitem(METHODS, name, replace(method, forward=forward, backward=backward))


def _one_slot_for_two(channel: Channel, column: str) -> Callable[..., tuple]:
    def change(tasks: np.ndarray, moves: np.ndarray) -> tuple:
        tasks[column] = np.minimum(tasks[column], 1)
        mine = moves["channel"] == channel
        for end in ("sslot", "dslot"):
            moves[end] = np.where(mine, np.minimum(moves[end], 1), moves[end])
        return tasks, moves

    return change


def keys_arrive_where_others_are_read(patch: Patch) -> None:
    _change_schedules(patch, _one_slot_for_two(Channel.K, "kslot"))


def one_slot_for_two_gradients(patch: Patch) -> None:
    _change_schedules(patch, _one_slot_for_two(Channel.DKV, "gslot"))


def band_one_wider(patch: Patch) -> None:
    def change(tasks: np.ndarray, moves: np.ndarray) -> tuple:
        tasks["hi"] += tasks["stride"]
        return tasks, moves

    _change_schedules(patch, change)


def source_row_off_by_one(patch: Patch) -> None:
    def change(tasks: np.ndarray, moves: np.ndarray) -> tuple:
        keys = moves["channel"] == Channel.K
        moves["s0"] = np.where(keys, np.maximum(moves["s0"] - 1, 0), moves["s0"])
        return tasks, moves

    _change_schedules(patch, change)


def _without(table: np.ndarray, index: int) -> np.ndarray:
    return np.delete(table, index)


def a_key_move_is_lost(patch: Patch) -> None:
    def change(tasks: np.ndarray, moves: np.ndarray) -> tuple:
        return tasks, _without(moves, np.flatnonzero(moves["channel"] == Channel.K)[0])

    _change_schedules(patch, change)


def the_last_task_is_lost(patch: Patch) -> None:
    _change_schedules(patch, lambda tasks, moves: (_without(tasks, -1), moves))


def a_gradient_stays_away(patch: Patch) -> None:
    def change(tasks: np.ndarray, moves: np.ndarray) -> tuple:
        gradients = np.flatnonzero(moves["channel"] == Channel.DKV)
        return tasks, _without(moves, gradients[-1]) if len(gradients) else moves

    _change_schedules(patch, change)


def diagonal_one_higher(patch: Patch) -> None:
    def columns(original, *args, hi=None, **kwargs):
        return original(*args, **kwargs) if hi is None else original(*args, hi=hi + 1, **kwargs)

    _wrap(patch, masks, "band_columns", columns)


def positions_shifted_by_one(patch: Patch) -> None:
    def shifted(original, layout, rank):
        return (original(layout, rank) + 1) % layout.seq_len

    original = layouts.Layout.positions
    patch.setattr(layouts.Layout, "positions", lambda layout, rank: shifted(original, layout, rank))


def a_row_of_another_range(patch: Patch) -> None:
    """Every range's rows start where they should, except for those of the last range."""

    def from_ranges(original, *args, **kwargs):
        layout = original(*args, **kwargs)
        ranges = layout.ranges.copy()
        ranges["start"][-1] -= 1
        ranges["stop"][-1] -= 1
        return replace(layout, ranges=ranges)

    _wrap(patch, layouts, "from_ranges", from_ranges)


def lse_of_local_keys(patch: Patch) -> None:
    def home(original, dout, q, k, v, lse, delta):
        keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        score = torch.einsum("bihd,bjhd->bihj", q, keys) / q.shape[-1] ** 0.5
        return original(dout, q, k, v, score.logsumexp(-1), delta)

    _wrap(patch, simulate, "backward_home", home)


def delta_is_left_out(patch: Patch) -> None:
    def home(original, dout, q, k, v, lse, delta):
        return original(dout, q, k, v, lse, torch.zeros_like(delta))

    _wrap(patch, simulate, "backward_home", home)


def sinks_are_ignored(patch: Patch) -> None:
    _wrap(patch, simulate, "forward_home", lambda original, q, k, v, sinks: original(q, k, v, None))


def softcap_has_no_slope(patch: Patch) -> None:
    _wrap(patch, matmul, "_scores", lambda original, *args: (original(*args)[0], None))


def a_key_head_of_another_group(patch: Patch) -> None:
    def parts(original, *args):
        for heads, key_heads in original(*args):
            for h in range(heads.start, heads.stop):
                yield slice(h, h + 1), slice(key_heads.stop - 1, key_heads.stop)

    _wrap(patch, matmul, "head_parts", parts)


def lse_is_not_counted(patch: Patch) -> None:
    def row_bytes(original, shapes, channel, *args):
        free = shapes.accumulator_itemsize if channel == Channel.O else 0
        return original(shapes, channel, *args) - free

    original = Shapes.row_bytes
    patch.setattr(Shapes, "row_bytes", lambda *args: row_bytes(original, *args))


def groups_take_the_first_heads(patch: Patch) -> None:
    def shift(original, schedule, part):
        return original(schedule, replace(part, q0=0, k0=0))

    _wrap(patch, head_groups, "shift_heads", shift)


def slices_forget_their_heads(patch: Patch) -> None:
    def tasks(original, core, grid, member, part):
        made = original(core, grid, member, part)
        made["head"] -= part.q0
        return made

    _wrap(patch, head_slicing, "_tasks", tasks)


def blocks_start_one_later(patch: Patch) -> None:
    def tasks_of(original, *args, **kwargs):
        made = original(*args, **kwargs)
        made["k_token"] -= 1
        return made

    _wrap(patch, rotation, "tasks_of", tasks_of)


def one_block_less(patch: Patch) -> None:
    """The run attends one block less than the reference."""
    _wrap(
        patch, simulate, "select_whole", lambda original, q, k, mask: original(q, k, mask)[..., 1:]
    )

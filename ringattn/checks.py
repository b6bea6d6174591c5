"""Checks of what a caller passes: one line each, before any work starts."""

import math
import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ringattn import candidates, choice, layouts, methods
from ringattn.cost import Cluster, load_cluster
from ringattn.errors import UserError, brief
from ringattn.kernels.select import kernel_names
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.routing import selection_shape
from ringattn.schedule import Shapes, Wire

if TYPE_CHECKING:
    from ringattn.context import ContextParallel

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def _are_counts(*values: object) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values)


def head_counts(heads: tuple[int, int]) -> tuple[int, int]:
    """(Hq, Hkv), checked."""
    pair = tuple(heads) if isinstance(heads, tuple | list) else (heads, heads)
    if len(pair) != 2 or not _are_counts(*pair) or pair[0] % pair[1]:
        raise UserError(
            f"heads={heads!r}",
            "must be (query heads, key heads) with query heads a multiple of key heads",
            "pass e.g. heads=(32, 8)",
        )
    return pair[0], pair[1]


def head_dims(head_dim: int | tuple[int, int]) -> tuple[int, int]:
    """(D of queries and keys, D of values), checked."""
    pair = tuple(head_dim) if isinstance(head_dim, tuple | list) else (head_dim, head_dim)
    if len(pair) != 2 or not _are_counts(*pair) or max(pair) > MAX_HEAD_DIM:
        raise UserError(
            f"head_dim={head_dim!r}", f"must be 1 to {MAX_HEAD_DIM}", "pass D or (D_qk, D_v)"
        )
    return pair[0], pair[1]


def shapes(heads: tuple[int, int], head_dim: tuple[int, int], dtype: torch.dtype | None) -> Shapes:
    """Sizes for counting bytes; dtype None counts torch's default dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(
            f"dtype={dtype}", "must be float64, float32, bfloat16 or float16", "cast the inputs"
        )
    counted = dtype or torch.get_default_dtype()
    return Shapes(
        q_heads=heads[0],
        kv_heads=heads[1],
        qk_dim=head_dim[0],
        v_dim=head_dim[1],
        itemsize=counted.itemsize,
        accumulator_itemsize=8 if counted == torch.float64 else 4,
    )


def wire(wire_dtype: torch.dtype | str | None, dtype: torch.dtype | None) -> Wire:
    """Whether partial results travel as accumulators or in the input dtype; accumulators where
    "auto" is to decide."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    if wire_dtype is None or wire_dtype == accumulator or wire_dtype == "auto":
        return Wire.ACCUMULATOR
    if wire_dtype == dtype:
        return Wire.INPUT
    known = dtype if dtype is not None else "named by dtype="
    raise UserError(
        f"wire_dtype={wire_dtype!r}",
        f"must be 'auto', the accumulators' {accumulator} or the input dtype {known}",
        "pass one of these torch dtypes, and dtype with it",
    )


def weighed_wire(wire_dtype: torch.dtype | str | None, priced: bool) -> bool:
    """Whether the planner is to weigh wire dtypes, which it does on a cluster only."""
    if wire_dtype == "auto" and not priced:
        raise UserError(
            "wire_dtype='auto'",
            "is chosen by predicted time, which needs a cluster",
            'pass cluster="..." or a dtype',
        )
    return wire_dtype == "auto"


def layout_options(given: dict[str, int | float], layout: str | Layout) -> None:
    """Settings of the layout: known to it, and numbers."""
    known = layouts.OPTIONS.get(layout, ()) if isinstance(layout, str) else ()
    for name, value in given.items():
        if name not in known:
            raise UserError(
                f"layout_options={given!r}",
                f"layout {layout if isinstance(layout, str) else layout.name!r} has "
                f"{'the options ' + ', '.join(known) if known else 'none'}",
                f"drop {name!r} or name the layout it belongs to",
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"layout_options={given!r}", f"{name} is a number", "pass one")


def names(method: str, layout: str | Layout, kernel: str) -> None:
    """Known method, layout and kernel names."""
    if method != "auto":
        methods.by_name(method)
    if not isinstance(layout, Layout) and layout not in (*layouts.NAMES, "auto"):
        raise UserError(
            f"layout={layout!r}", f"must be one of {', '.join(layouts.NAMES)}, auto", "pick one"
        )
    if kernel != "auto" and kernel not in kernel_names():
        raise UserError(
            f"kernel={kernel!r}", f"must be one of {', '.join(kernel_names())}, auto", "pick one"
        )


def cluster(given: object) -> Cluster | None:
    """The cluster of a name or a file, or None for none.

    Raises:
        UserError: no such cluster, or a file that describes none.
    """
    if given is None or isinstance(given, Cluster):
        return given
    if not isinstance(given, str | os.PathLike):
        raise UserError(
            f"cluster={given!r}", "must be a name or the path of a YAML file", "pass e.g. h100_sxm"
        )
    return load_cluster(given)


def counts(**values: int | None) -> None:
    """Settings that count something: positive integers, or None for the default."""
    for name, value in values.items():
        if value is not None and not _are_counts(value):
            raise UserError(
                f"{name}={value!r}",
                "must be a positive integer",
                f"pass {name} >= 1 or leave it out",
            )


def options(given: dict[str, int], method: str, priced: bool) -> None:
    """Settings of the method: known to it, positive integers.

    `priced` tells whether "auto" weighs what the planner does on a cluster.
    """
    weighed = candidates.AUTO_METHODS if priced else choice.AUTO_METHODS
    made = weighed if method == "auto" else (method,)
    known = sorted({name for m in made for name in methods.by_name(m).options})
    for name in given:
        if name not in known:
            raise UserError(
                f"options={given!r}",
                f"method {method!r} has {'the options ' + ', '.join(known) if known else 'none'}",
                f"drop {name!r} or choose the method it belongs to",
            )
    counts(**given)


def is_duration(timeout: object) -> None:
    """A timeout is a timedelta or None."""
    if timeout is not None and not isinstance(timeout, timedelta):
        raise UserError(
            f"timeout={timeout!r}", "must be a timedelta", "pass e.g. timedelta(seconds=60)"
        )


def settings(given: object, name: str) -> dict:
    """Settings as a dict. True counts as 1, and what is False is left out."""
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{name}={given!r}", "must be a dict", 'pass e.g. {"u": 2}')
    found = (given or {}).items()
    return {key: 1 if value is True else value for key, value in found if value is not False}


def is_plan(plan: object) -> None:
    """What is run or proved is a plan."""
    if getattr(plan, "handle", None) is None:
        raise UserError(f"plan={plan!r}", "must be a ringattn.Plan", "make one with cp.plan(mask)")


def is_routed(mask: Mask) -> None:
    """A mask whose blocks are selected at run time."""
    if mask.routing is None:
        raise UserError(
            f"{mask!r}", "selects no blocks at run time", "plan a ringattn.masks.routed"
        )


def is_mask(mask: object) -> None:
    """What is planned for is a mask."""
    if not isinstance(mask, Mask):
        raise UserError(
            f"mask={brief(mask)}", "must be a ringattn.Mask", "build one with ringattn.masks"
        )


def layout_world(layout: str | Layout, world: int) -> None:
    """A given layout is for as many ranks as the group has."""
    if isinstance(layout, Layout) and layout.world != world:
        raise UserError(
            f"layout for {layout.world} ranks",
            f"the group has {world} ranks",
            "build the layout for the group's size",
        )


def check_softcap(softcap: float | None) -> None:
    """Raises UserError unless the cap is None or positive and finite."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise UserError(f"softcap={softcap}", "must be positive and finite", "pass None for no cap")


def check_scale(scale: float | None) -> None:
    """Raises UserError unless the scale is None or a finite number other than 0."""
    if scale is not None and (scale == 0 or not math.isfinite(scale)):
        raise UserError(
            f"scale={scale}", "must be finite and not 0", "pass None for 1 / sqrt(head dim)"
        )


def check_tensors(
    context: "ContextParallel",
    rows: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Raises UserError where q, k, v or sinks do not fit the context and the shard's rows."""
    (hq, hkv), (qk_dim, v_dim) = context.heads, context.head_dim
    expected = {"q": (rows, hq, qk_dim), "k": (rows, hkv, qk_dim), "v": (rows, hkv, v_dim)}
    for (name, shape), tensor in zip(expected.items(), (q, k, v), strict=True):
        if tuple(tensor.shape) != (q.shape[0], *shape):
            raise UserError(
                f"{name} of shape {tuple(tensor.shape)} on rank {context.rank}",
                f"must be (B, tokens of this rank, heads, head dim) = (B, {str(shape)[1:]}",
                "shard the sequence with plan.shard and check heads and head_dim",
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise UserError(
                f"{name} is {tensor.dtype} on {tensor.device}",
                f"q is {q.dtype} on {q.device}",
                "give q, k and v one dtype and one device",
            )
    if q.dtype not in DTYPES or (context.dtype is not None and q.dtype != context.dtype):
        raise UserError(
            f"q is {q.dtype}",
            f"the context takes {context.dtype or 'float64, float32, bfloat16, float16'}",
            "cast q, k and v, or build the ContextParallel with that dtype",
        )
    if q.device.type != context.device.type:
        raise UserError(
            f"q is on {q.device}",
            f"the group's ranks exchange tensors on {context.device.type}",
            "move q, k and v, use a group with that backend, or pass staged= to ContextParallel",
        )
    if sinks is not None and (tuple(sinks.shape) != (hq,) or sinks.device != q.device):
        raise UserError(
            f"sinks of shape {tuple(sinks.shape)} on {sinks.device}",
            f"must be ({hq},), one logit per query head, on {q.device}",
            "pass a parameter of that shape",
        )


def check_blocks(mask: Mask, q: torch.Tensor, k: torch.Tensor, blocks: torch.Tensor | None) -> None:
    """Raises UserError where selected blocks do not fit the mask, or where none are asked for."""
    if mask.routing is None:
        if blocks is not None:
            raise UserError(
                f"blocks with {mask!r}", "the mask selects no blocks at run time", "pass None"
            )
        return
    expected = (q.shape[0], *selection_shape(mask, q.shape[2], k.shape[2]))
    if blocks is None or tuple(blocks.shape) != expected or blocks.dtype != torch.int32:
        given = "None" if blocks is None else f"{blocks.dtype} of shape {tuple(blocks.shape)}"
        raise UserError(
            f"blocks={given}",
            f"must be int32 of shape {expected}",
            "pass what ringattn.route gives",
        )
    # On an accelerator looking at the values would wait for it.
    if blocks.device.type == "cpu" and not _names_blocks(blocks, mask.routing.k_blocks):
        raise UserError(
            f"blocks from {int(blocks.min())} to {int(blocks.max())}",
            f"each row must name blocks 0 to {mask.routing.k_blocks - 1} once, ascending, then -1",
            "pass what ringattn.route gives for this plan",
        )


def _names_blocks(blocks: torch.Tensor, count: int) -> bool:
    """Whether every row is ascending block numbers below `count`, then -1."""
    used = blocks >= 0
    rising = ~used[..., 1:] | (used[..., :-1] & (blocks[..., 1:] > blocks[..., :-1]))
    return bool(((blocks >= -1) & (blocks < count)).all() and rising.all())

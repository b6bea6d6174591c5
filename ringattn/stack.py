"""One layout for a stack of masks: tokens are sharded once, and the layers attend differently.

The layout is chosen for the stack as a whole. Each mask offers the layouts that suit it, and the
one on which all layers together cost least wins; the method stays free for each mask. Pure host
work: nothing but masks and the group's arguments enters, so that all ranks choose alike.
"""

from collections.abc import Callable, Sequence

from ringattn import checks
from ringattn.choice import nominal_cost
from ringattn.errors import UserError
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.plan import Plan


def count_layers(masks: Sequence[Mask]) -> dict[Mask, int]:
    """Layers of each distinct mask, in order of first use.

    Raises:
        UserError: no mask, something else than a mask, or masks of different lengths.
    """
    counts: dict[Mask, int] = {}
    for mask in masks:
        checks.is_mask(mask)
        counts[mask] = counts.get(mask, 0) + 1
    if len({mask.seq_len for mask in counts}) != 1:
        lengths = sorted({mask.seq_len for mask in counts})
        raise UserError(
            f"masks of {lengths} tokens" if counts else "masks=[]",
            "must be one mask per layer over one sequence",
            "build all of them for the same tokens",
        )
    return counts


def cost(plan: Plan) -> float:
    """What plans of a group are compared by: predicted seconds, without a cluster nominal FLOPs."""
    seconds = plan.seconds
    return nominal_cost((plan.forward, plan.backward)) if seconds is None else seconds


def choose_layout(
    counts: dict[Mask, int],
    offers: Callable[[Mask], list[Plan]],
    plan_on: Callable[[Mask, Layout], Plan],
) -> Layout:
    """The layout on which the whole stack costs least.

    Layouts are tried in the order of what they promise: a mask's cost there where that is known,
    its least cost where not. The search ends when no layout left promises less than the best.

    Args:
        counts: layers of each mask.
        offers: plans of a mask, the best first, each on another layout.
        plan_on: plans a mask on a layout.

    Raises:
        UserError: no offered layout takes all masks.
    """
    found = {mask: offers(mask) for mask in counts}
    known = {mask: {p.layout.key: cost(p) for p in plans} for mask, plans in found.items()}
    # The mask with most work first: where layouts tie, its own wins.
    masks = sorted(counts, key=lambda mask: -counts[mask] * mask.area)
    places = {p.layout.key: p.layout for mask in masks for p in found[mask]}

    def promise(key: str) -> float:
        least = (known[m].get(key, min(known[m].values())) for m in masks)
        return sum(counts[m] * c for m, c in zip(masks, least, strict=True))

    best: tuple[float, Layout] | None = None
    refused: UserError | None = None
    for key in sorted(places, key=promise):
        if best is not None and promise(key) >= best[0]:
            break
        try:
            total = 0.0
            for m in masks:
                there = known[m].get(key)
                total += counts[m] * (cost(plan_on(m, places[key])) if there is None else there)
        except UserError as error:  # needs too much memory there
            refused = error
            continue
        if best is None or total < best[0]:
            best = total, places[key]
    if best is None:
        assert refused is not None
        raise refused
    return best[1]

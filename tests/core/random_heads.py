"""How the heads of a tile may lie in slots whose heads are not those of home.

In a task, query head h of a slot of Q heads meets key head h // (Q // K) of a slot of K heads. A
slot may hold any heads in any order, and a key head more than once, as long as that holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """Heads of a task's slots.

    Attributes:
        at, q_heads: first of the tile's heads in its query slot, and that slot's heads.
        key_at, k_heads: first key head used in the key slot, and that slot's heads.
        keys: actual key head of each key head used.
    """

    at: int
    q_heads: int
    key_at: int
    k_heads: int
    keys: tuple[int, ...]


def fits(
    heads: range,
    q_heads: int,
    kv_heads: int,
    query: tuple[int, int] | None = None,
    key: tuple[int, Mapping[int, int]] | None = None,
) -> list[Fit]:
    """All ways to lay out a tile's heads, of Hq = q_heads and Hkv = kv_heads.

    Args:
        query: (first head, heads of the slot) where the query slot is given.
        key: (heads of the slot, actual head by slot head) where the key slot is given.
    """
    wide = range(len(heads), q_heads + 3)
    queries = [query] if query else [(at, n) for n in wide for at in range(n - len(heads) + 1)]
    found = []
    for at, count in queries:
        for k_heads in [key[0]] if key else range(1, count + 1):
            fit = _fit(heads, q_heads // kv_heads, at, count, k_heads)
            if fit is None or (key and any(key[1].get(h) != a for h, a in _pairs(fit))):
                continue
            found.append(fit)
    return found


def _pairs(fit: Fit) -> list[tuple[int, int]]:
    return [(fit.key_at + index, actual) for index, actual in enumerate(fit.keys)]


def _fit(heads: range, ratio: int, at: int, q_heads: int, k_heads: int) -> Fit | None:
    if q_heads % k_heads:
        return None
    group, keys = q_heads // k_heads, {}
    for index, head in enumerate(heads):
        if keys.setdefault((at + index) // group, head // ratio) != head // ratio:
            return None
    return Fit(at, q_heads, min(keys), k_heads, tuple(keys.values()))

"""What the kernel benchmark measures, in which order: the product of masks, lengths and shapes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ringattn.benchmarks.kernel_masks import NAMES, mask_named
from ringattn.errors import UserError
from ringattn.masks import Mask

LENGTHS = tuple(1024 << i for i in range(8))
HEADS = ((64, 8), (32, 32), (16, 2))
HEAD_DIMS = (64, 128, 256)
SUBSETS = ("cpu", "headline", "all")
_FIRST = ("causal", "documents_causal_4k", "window_causal", "full", "blocks_uniform")
_BARS = (
    "blocks_variable", "shared_question_4k", "prefix_lm", "block_causal_documents",
    "causal_blockwise_4k",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One mask and shape. `head_dim` is (D of queries and keys, D of values)."""

    mask: str
    seq_len: int
    heads: tuple[int, int] = (64, 8)
    head_dim: tuple[int, int] = (128, 128)
    dtype: str = "bfloat16"

    @property
    def setting(self) -> str:
        """All but the mask."""
        dims = "-".join(str(d) for d in dict.fromkeys(self.head_dim))
        return f"{self.seq_len}-{self.heads[0]}:{self.heads[1]}-d{dims}-{self.dtype}"

    def __str__(self) -> str:
        return f"{self.mask}-{self.setting}"

    def build(self) -> Mask:
        """The mask."""
        return mask_named(self.mask, self.seq_len)


def subset(name: str) -> list[Case]:
    """The cases of a subset, most wanted first.

    cpu: all masks at 1K, some at 2K, few heads. headline: what the project's bars and published
    figures are about, then a look at every mask, length and shape. all: headline, then the rest
    of the product.
    """
    cases = {"cpu": _cpu, "headline": _headline, "all": _all}[name]()
    return list(dict.fromkeys(cases))


def _cpu() -> Iterator[Case]:
    for mask in (*_FIRST, *_BARS, *NAMES):
        yield Case(mask, 1024, heads=(8, 2), head_dim=(64, 64))
    for mask in (*_FIRST, *_BARS):
        yield Case(mask, 2048, heads=(8, 2), head_dim=(64, 64))
    for mask in _FIRST[:3]:
        yield Case(mask, 1024, heads=(8, 2), head_dim=(64, 64), dtype="float32")
        yield Case(mask, 1024, heads=(4, 4), head_dim=(128, 128))


def _headline() -> Iterator[Case]:
    for mask in _FIRST:
        yield Case(mask, 32768)
    for mask in _BARS:
        yield Case(mask, 32768)
    for mask in ("causal", "full"):
        yield Case(mask, 131072)
    for mask in NAMES:
        yield Case(mask, 32768)
    yield from (Case("causal", 32768, head_dim=(d, d)) for d in HEAD_DIMS)
    yield from (Case("causal", 32768, heads=h) for h in HEADS)
    yield from (Case("causal", n) for n in reversed(LENGTHS))
    yield from (Case(mask, 8192) for mask in (*_FIRST, *_BARS))
    yield from (Case("full", n) for n in (65536, 8192))
    yield Case("causal", 32768, head_dim=(192, 128))


def _all() -> Iterator[Case]:
    yield from _headline()
    for heads in HEADS:
        for dim in sorted(HEAD_DIMS, key=lambda d: d != 128):
            for seq_len in sorted(LENGTHS, key=lambda n: abs(n - 32768)):
                for mask in NAMES:
                    yield Case(mask, seq_len, heads, (dim, dim))


def selected(
    cases: Iterable[Case],
    *,
    masks: list[str] | None = None,
    lengths: list[int] | None = None,
    heads: list[str] | None = None,
    head_dims: list[int] | None = None,
    dtype: str | None = None,
) -> list[Case]:
    """The cases that have the given properties; a dtype replaces that of every case.

    Raises UserError where none is left, naming the values that there are.
    """
    made = list(cases)
    if dtype:
        made = [Case(c.mask, c.seq_len, c.heads, c.head_dim, dtype) for c in made]
    kept = [
        case
        for case in dict.fromkeys(made)
        if (not masks or case.mask in masks)
        and (not lengths or case.seq_len in lengths)
        and (not heads or f"{case.heads[0]}:{case.heads[1]}" in heads)
        and (not head_dims or case.head_dim[0] in head_dims)
    ]
    if not kept:
        raise UserError(
            f"masks={masks} lengths={lengths} heads={heads} head_dims={head_dims}",
            f"no case of {len(made)} has these: masks {', '.join(NAMES)}; "
            f"lengths {sorted({c.seq_len for c in made})}; "
            f"heads {sorted({f'{c.heads[0]}:{c.heads[1]}' for c in made})}; "
            f"head dims {sorted({c.head_dim[0] for c in made})}",
            "ask for some of them, or take --subset all",
        )
    return kept

"""What attention suites measure: a problem, who computes it, and on how many ranks."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from ringattn.benchmarks.peers.base import Shape, Tensors
from ringattn.benchmarks.suites.mask_cases import Sampled, is_sampled, sampled
from ringattn.benchmarks.suites.settings import Common
from ringattn.masks import Mask

OURS = "ringattn"
DIRECTIONS = ("forward", "backward", "both")
FLOPS = {"forward": 4.0, "backward": 10.0, "both": 14.0}
"""FLOPs per allowed pair, query head and head dim."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mask and the shape of what attends it. Travels to the ranks as JSON values.

    Attributes:
        mask, pack, lengths, seq_len: as in `mask_cases.sampled`.
        heads, head_dim, dtype, seed: of the inputs; batch 1.
    """

    mask: str
    seq_len: int
    pack: int = 0
    lengths: str = "short"
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    dtype: str = "float32"
    seed: int = 42

    @cached_property
    def sample(self) -> Sampled:
        """The mask with what was drawn for it."""
        return sampled(self.mask, self.seq_len, self.pack, self.lengths, self.heads[0])

    def built(self) -> Mask:
        """The mask."""
        return self.sample.mask

    @property
    def area(self) -> float:
        """Allowed pairs of a query head, the mean over heads; exact."""
        return self.built().area / self.built().layers

    def flops(self, direction: str) -> float:
        """FLOPs of a direction by exact area."""
        return FLOPS[direction] * self.area * self.heads[0] * self.head_dim

    def shape(self, device: str = "cpu") -> Shape:
        """The shape as peers take it."""
        return Shape(*self.heads, self.head_dim, self.seed, getattr(torch, self.dtype), device)

    def inputs(self, device: str = "cpu") -> Tensors:
        """Whole q, k, v, dout (1, S, heads, D), equal in every process."""
        return self.shape(device).inputs(self.seq_len)

    @property
    def name(self) -> str:
        """Unique among problems."""
        pack = f"-{self.lengths.replace('/', '_')}-pack{self.pack}" if is_sampled(self.mask) else ""
        heads = f"h{self.heads[0]}x{self.heads[1]}-d{self.head_dim}-{self.dtype}"
        return f"{self.mask}{pack}-s{self.seq_len}-{heads}"

    def config(self) -> dict[str, Any]:
        """The parameters, for records."""
        found = asdict(self) | {"heads": list(self.heads), "batch": 1}
        return found | {"parameters": self.sample.parameters}


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """Who computes a problem.

    Attributes:
        contender: `OURS`, a peer's name, or "module:attribute" for an adapter of one's own.
        method, layout, cluster: of ours; "" for peers.
        ranks_per_node: that plans see; None for the launcher's.
        alone: each rank computes the whole problem by itself, all at the same time.
    """

    contender: str = OURS
    method: str = ""
    layout: str = ""
    cluster: str | None = None
    ranks_per_node: int | None = None
    alone: bool = False

    @property
    def key(self) -> str:
        """Unique among the entrants of a problem."""
        if self.contender != OURS:
            return self.contender
        node = "" if self.ranks_per_node is None else f"-node{self.ranks_per_node}"
        cluster = f"-{self.cluster}" if self.cluster and self.method == "auto" else ""
        return f"{self.method}-{self.layout}{node}{cluster}" + "-alone" * self.alone


BASELINE = Entrant(method="ring", layout="contiguous", alone=True)
"""What CPU times are compared with: our kernel on the whole mask in one process. Every rank runs a
copy, because a core that has a busy neighbour is slower than one that has none."""


def problems(
    common: Common, seq_lens: tuple[int, ...], masks: tuple[str, ...]
) -> Iterator[Problem]:
    """The product of masks, lengths and packs. Masks that sample nothing come once.

    The first pack of every mask comes before any second one: a run that is stopped has all masks.
    """
    for seq_len in seq_lens:
        for pack in range(common.packs):
            for mask in masks:
                if pack and not is_sampled(mask):
                    continue
                for name in common.lengths if _has_documents(mask) else common.lengths[:1]:
                    yield Problem(
                        mask=mask, seq_len=seq_len, pack=pack, lengths=name, heads=common.heads,
                        head_dim=common.head_dim, dtype=common.dtype, seed=common.seed,
                    )  # fmt: skip


def _has_documents(mask: str) -> bool:
    """Whether a mask's documents come from a histogram."""
    named = ("documents", "shared_question", "causal_blockwise", "prefix_lm_documents")
    return mask.startswith(named)

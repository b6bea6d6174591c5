"""The interface every local attention kernel has (shapes as in the module legend).

B batch, Tq / Tk rows of the query / key buffer, Hq / Hkv heads, D head dim of queries and keys,
E of values.

    q (B, Tq, Hq, D)   k (B, Tk, Hkv, D)   v (B, Tk, Hkv, E)   out, dout (B, Tq, Hq, E)
    lse, delta (B, Tq, Hq)   natural logarithm; -inf for a row that has seen no key

Accumulators (out, lse, dq, dk, dv) are float32, or float64 for float64 inputs.
"""

from typing import Any, Protocol

import numpy as np
import torch

from ringattn.kernels.block_matrix import BlockTiles, Selection


class Kernel(Protocol):
    """Local attention over a tile list. Stateless: `prepare` holds whatever can be done once."""

    name: str
    reads_around: bool
    """Whether rows that no tile names may be read. They must then hold finite numbers."""

    def refusal(
        self, *, device: str, dtype: torch.dtype, head_dim: tuple[int, int], softcap: float | None
    ) -> str | None:
        """Why this kernel cannot run such inputs (value, rule), or None when it can."""
        ...

    def prepare(
        self, tiles: np.ndarray, device: torch.device, blocks: BlockTiles | None = None
    ) -> Any:
        """Turns a table of dtype `TILE`, and block tiles, into what forward and backward take.

        Once per plan. Raises UserError for tiles that this kernel cannot run.
        """
        ...

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Any,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """Merges softmax attention over the tiles into (out, lse), in place.

        (out, lse) hold a partial result normalised by its own lse; (0, -inf) is the identity.
        `selection` holds the blocks of run-time matrices.
        """
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        prepared: Any,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        selection: Selection | None = None,
    ) -> None:
        """Adds the tiles' gradients to dq, dk, dv, in place.

        lse and delta = rowsum(dout * out) are those of the whole sequence, not of these tiles.
        """
        ...

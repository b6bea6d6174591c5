"""The tile table: what a local attention kernel is asked to compute.

A tile lets query row i of the query buffer attend key row j of the key buffer for
query heads ``h0 <= h < h1`` iff

    i in range(q0, q1, step),  j in range(k0, k1, step),  lo <= j - i <= hi.

Rows are buffer-local. Key head of query head h is ``h // (Hq // Hkv)`` in buffer heads.
Tiles of one list are disjoint and tight: every query row and key row named by a tile is used.
"""

import numpy as np

TILE = np.dtype(
    [(name, np.int64) for name in ("h0", "h1", "q0", "q1", "k0", "k1", "lo", "hi", "step")]
)

"""Attention and gradients of a few rows, keys and heads of a long sequence, exactly enough.

One key head and its query heads are judged. Their lse and delta = rowsum(dout * out) are computed
for all rows, in float32 for 16-bit inputs (a thousandth of what those kernels round off), else in
float64; out and dq of some random rows, and dk and dv of some random keys, in float64. Masks are
read from their bands, not from a plan's tiles; no code is shared with the kernels judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ringattn.masks import Mask

SAMPLES = 256  # rows, and keys
SCORES = 1 << 27  # numbers held at once


@dataclass(frozen=True, eq=False)
class Sample:
    """Which rows, keys and heads are judged: sorted token ids, a key head, its query heads."""

    rows: np.ndarray
    keys: np.ndarray
    key_head: int
    heads: slice

    @classmethod
    def draw(cls, seq_len: int, heads: tuple[int, int], seed: int) -> "Sample":
        """A random sample."""
        rng = np.random.default_rng(seed)
        count = min(SAMPLES, seq_len)
        rows, keys = (np.sort(rng.choice(seq_len, count, replace=False)) for _ in range(2))
        key_head, group = int(rng.integers(heads[1])), heads[0] // heads[1]
        return cls(rows, keys, key_head, slice(key_head * group, (key_head + 1) * group))


@dataclass(frozen=True, eq=False)
class Reference:
    """float64 results of a sample: out, dq (rows, group, D), lse (rows, group; -inf for a row
    without keys) and dk, dv (keys, D)."""

    sample: Sample
    results: Mapping[str, torch.Tensor]

    def error(self, name: str, got: torch.Tensor) -> float:
        """Relative error (Frobenius norm) of a whole (1, S, heads, D) result on the sample."""
        s = self.sample
        if name in ("out", "lse", "dq"):
            part = got[0, torch.from_numpy(s.rows).to(got.device), s.heads]
        else:
            part = got[0, torch.from_numpy(s.keys).to(got.device), s.key_head]
        want = self.results[name]
        return float((part.double() - want).norm() / want.norm().clamp_min(1e-300))


def reference(
    mask: Mask,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    sample: Sample,
) -> Reference:
    """The sample's results; tensors (1, S, heads, D) on any device. Needs a uniform mask."""
    q, dout = (x[0, :, sample.heads].transpose(0, 1) for x in (q, dout))  # (group, S, D)
    k, v = (x[0, :, sample.key_head] for x in (k, v))
    lse, delta = _statistics(mask, q, k, v, dout, scale)
    results = _of_rows(mask, q, k, v, dout, scale, sample.rows)
    at = lse[:, torch.from_numpy(sample.rows).to(lse.device)].T
    results["lse"] = at.masked_fill(at == torch.inf, -torch.inf)
    results |= _of_keys(mask, q, k, v, dout, scale, sample.keys, lse, delta)
    return Reference(sample, results)


def allowed_pairs(
    mask: Mask, rows: np.ndarray, keys: np.ndarray, device: torch.device
) -> torch.Tensor:
    """bool (rows, keys): which of these tokens, each sorted, may attend which."""
    allowed = torch.zeros(len(rows), len(keys), dtype=torch.bool, device=device)
    row, key = (torch.from_numpy(x).to(device, torch.int32) for x in (rows, keys))
    bands, blocks = mask.bands, {}
    edges = (bands["q0"], bands["q1"]), (bands["k0"], bands["k1"])
    (r0, r1), (c0, c1) = (
        [np.searchsorted(at, edge) for edge in pair] for at, pair in zip((rows, keys), edges)
    )
    for index in np.flatnonzero((r0 < r1) & (c0 < c1)):
        r, c = row[r0[index] : r1[index], None], key[None, c0[index] : c1[index]]
        band = {name: int(bands[index][name]) for name in bands.dtype.names or ()}
        distance = c - r
        inside = (distance >= max(band["lo"], -(1 << 30))) & (distance <= min(band["hi"], 1 << 30))
        if band["step"] > 1:
            inside &= ((r - band["q0"]) % band["step"] == 0) & (
                (c - band["k0"]) % band["step"] == 0
            )
        if (number := int(mask.matrix[index])) >= 0:
            if number not in blocks:
                blocks[number] = _block_pairs(mask, number, rows, keys, device)
            inside &= blocks[number][r0[index] : r1[index], c0[index] : c1[index]]
        allowed[r0[index] : r1[index], c0[index] : c1[index]] |= inside
    return allowed


def _block_pairs(
    mask: Mask, number: int, rows: np.ndarray, keys: np.ndarray, device: torch.device
) -> torch.Tensor:
    matrix = mask.matrices[number]
    assert matrix.allowed is not None
    q, k = (
        torch.from_numpy(np.searchsorted(edges, at, side="right") - 1).to(device)
        for edges, at in ((matrix.q_edges, rows), (matrix.k_edges, keys))
    )
    return torch.from_numpy(matrix.allowed).to(device)[q][:, k]


def _hull(mask: Mask, start: int, stop: int) -> np.ndarray:
    """The run of keys that holds all that rows [start, stop) see."""
    bands = mask.bands[(mask.bands["q0"] < stop) & (mask.bands["q1"] > start)]
    if not len(bands):
        return np.arange(0)
    low = np.maximum(bands["k0"], np.maximum(bands["q0"], start) + bands["lo"]).min()
    high = np.minimum(bands["k1"], np.minimum(bands["q1"], stop) + bands["hi"]).max()
    return np.arange(max(0, int(low)), max(0, min(mask.seq_len, int(high))))


def _statistics(
    mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse and delta of all rows, float64 (group, S); a row without keys has lse +inf."""
    wide = torch.float32 if q.dtype.itemsize == 2 else torch.float64
    group, seq_len = q.shape[:2]
    lse = torch.full((group, seq_len), torch.inf, dtype=torch.float64, device=q.device)
    delta = torch.zeros_like(lse)
    k, v, start = k.to(wide), v.to(wide), 0
    while start < seq_len:
        # The hull of few rows tells how many fit.
        span = max(1, len(_hull(mask, start, min(start + 256, seq_len))))
        stop = min(start + max(16, min(2048, SCORES // (span * group))), seq_len)
        keys = _hull(mask, start, stop)
        at = slice(start, stop)
        start = stop
        if not len(keys):
            continue
        to = slice(int(keys[0]), int(keys[-1]) + 1)
        forbidden = ~allowed_pairs(mask, np.arange(at.start, at.stop), keys, q.device)
        score = (q[:, at].to(wide) @ k[to].T).mul_(scale).masked_fill_(forbidden, -torch.inf)
        found = torch.logsumexp(score, -1)
        found.masked_fill_(found == -torch.inf, torch.inf)
        out = score.sub_(found.unsqueeze(-1)).exp_() @ v[to]
        lse[:, at], delta[:, at] = found.double(), (out * dout[:, at].to(wide)).sum(-1).double()
    return lse, delta


def _of_rows(
    mask: Mask,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    rows: np.ndarray,
) -> dict[str, torch.Tensor]:
    at = torch.from_numpy(rows).to(q.device)
    q, dout = q[:, at].double(), dout[:, at].double()
    k, v = k.double(), v.double()
    forbidden = ~allowed_pairs(mask, rows, np.arange(mask.seq_len), q.device)
    outs, dqs = [], []
    for query, gradient in zip(q, dout):
        score = (query @ k.T).mul_(scale).masked_fill_(forbidden, -torch.inf)
        prob = torch.softmax(score, -1).masked_fill_(forbidden, 0.0)
        out = prob @ v
        dprob = (gradient @ v.T).sub_((gradient * out).sum(-1, keepdim=True))
        outs.append(out)
        dqs.append((dprob.mul_(prob) @ k).mul_(scale))
    return {"out": torch.stack(outs, 1), "dq": torch.stack(dqs, 1)}


def _of_keys(
    mask: Mask,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    keys: np.ndarray,
    lse: torch.Tensor,
    delta: torch.Tensor,
) -> dict[str, torch.Tensor]:
    at = torch.from_numpy(keys).to(q.device)
    k, v = k[at].double(), v[at].double()
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    at_once = max(1, SCORES // (4 * len(keys)))
    for start in range(0, mask.seq_len, at_once):
        part = slice(start, min(start + at_once, mask.seq_len))
        allowed = allowed_pairs(mask, np.arange(part.start, part.stop), keys, q.device)
        for head in range(q.shape[0]):
            query, gradient = q[head, part].double(), dout[head, part].double()
            score = (query @ k.T).mul_(scale).sub_(lse[head, part, None])
            prob = score.exp_().mul_(allowed)
            dv += prob.T @ gradient
            dscore = (gradient @ v.T).sub_(delta[head, part, None]).mul_(prob)
            dk += (dscore.T @ query).mul_(scale)
    return {"dk": dk, "dv": dv}

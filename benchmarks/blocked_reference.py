"""Attention and its gradients in float64 on a whole sequence, in memory linear in its length.

Plain products over runs of query rows and the keys that any of them sees. It shares no code with
the kernels that it judges.
"""

import numpy as np
import torch

import ringattn as ra
from ringattn.benchmarks.peers.base import Tensors
from ringattn.benchmarks.peers.cases import allowed_block

ROWS = 512


def blocked_reference(inputs: Tensors, mask: ra.Mask, rows: int = ROWS) -> Tensors:
    """out, dq, dk, dv (1, S, heads, D), float64, of whole q, k, v, dout of any float dtype."""
    q, k, v, dout = (x[0].double().transpose(0, 1) for x in inputs)  # (heads, S, D)
    group, scale = q.shape[0] // k.shape[0], q.shape[-1] ** -0.5
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    for start in range(0, mask.seq_len, rows):
        block = range(start, min(start + rows, mask.seq_len))
        keys = _keys(mask, block)
        forbidden = torch.from_numpy(~allowed_block(mask, block, keys, q.shape[0]))
        at, to = slice(block.start, block.stop), slice(keys.start, keys.stop)
        for head in range(q.shape[0]):
            shared, hidden = head // group, forbidden if forbidden.ndim == 2 else forbidden[head]
            query, key, value = q[head, at], k[shared, to], v[shared, to]
            score = (query @ key.T).mul_(scale).masked_fill_(hidden, -torch.inf)
            prob = torch.softmax(score, 1).masked_fill_(hidden, 0.0)
            out[head, at] = prob @ value
            gradient = dout[head, at]
            dv[shared, to] += prob.T @ gradient
            dprob = gradient @ value.T
            dprob -= (gradient * out[head, at]).sum(1, keepdim=True)
            dscore = dprob.mul_(prob).mul_(scale)
            dq[head, at] = dscore @ key
            dk[shared, to] += dscore.T @ query
    out, dq, dk, dv = (x.transpose(0, 1).unsqueeze(0) for x in (out, dq, dk, dv))
    return out, dq, dk, dv


def _keys(mask: ra.Mask, block: range) -> range:
    """The run of keys that holds all that the query rows of a block may see."""
    bands = mask.bands[(mask.bands["q0"] < block.stop) & (mask.bands["q1"] > block.start)]
    if not len(bands):
        return range(0)
    low = np.maximum(bands["k0"], np.maximum(bands["q0"], block.start) + bands["lo"])
    high = np.minimum(bands["k1"], np.minimum(bands["q1"], block.stop) + bands["hi"])
    return range(max(0, int(low.min())), min(mask.seq_len, int(high.max())))

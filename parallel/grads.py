"""Gradients summed over ranks in flat float32 buckets."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class GradientBuckets:
    """Flat float32 storage for the gradients of replicated parameters, summed over a group.

    Each parameter's ``.grad`` is a view into a bucket: backward passes accumulate into it in place
    (so micro-batches add up), and one all-reduce per bucket needs no copies. Parameters are taken
    in the given order, which must be the same on every rank.

    Args:
        parameters: float32 parameters on one device; those that need no gradient are skipped.
        group: ranks over which `reduce` sums.
        bucket_bytes: upper bound of a bucket that holds more than one parameter.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        *,
        bucket_bytes: int = 32 * 2**20,
    ) -> None:
        self._group = group
        self._parameters = [p for p in parameters if p.requires_grad]
        self._views: list[torch.Tensor] = []
        self.buckets: list[torch.Tensor] = []
        for members in _split(self._parameters, bucket_bytes // 4):
            bucket = torch.zeros(sum(p.numel() for p in members), device=members[0].device)
            self.buckets.append(bucket)
            parts = bucket.split([p.numel() for p in members])
            self._views += [part.view_as(p) for part, p in zip(parts, members, strict=True)]
        self.zero()

    def zero(self) -> None:
        """Clears the gradients and puts every ``.grad`` back on its bucket."""
        for bucket in self.buckets:
            bucket.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def reduce(self) -> None:
        """Sums all gradients over the group, in place. Every rank of the group calls it.

        A sum, never a mean: the loss is already divided by the step's global token count.
        """
        self._check_views()
        if self._group.size() == 1:
            return
        works: list[Any] = [
            dist.all_reduce(bucket, op=dist.ReduceOp.SUM, group=self._group, async_op=True)
            for bucket in self.buckets
        ]
        for work in works:
            work.wait()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scales all gradients by min(1, max_norm / norm); max_norm 0 leaves them.

        Call after `reduce`: every rank then computes the same norm from the same values.

        Returns:
            The L2 norm before scaling, a scalar tensor on the gradients' device.
        """
        norm = torch.linalg.vector_norm(torch.stack([exact_norm(b) for b in self.buckets])).float()
        if max_norm > 0:
            # No host synchronisation: the factor stays on the device.
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for bucket in self.buckets:
                bucket.mul_(factor)
        return norm

    def _check_views(self) -> None:
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is None or parameter.grad.data_ptr() != view.data_ptr():
                raise RuntimeError("a gradient left its bucket: clear gradients with zero() only")


def exact_norm(values: torch.Tensor) -> torch.Tensor:
    """L2 norm of float32 values, a float64 scalar.

    In float32 the CPU adds squares one after another: 1e-5 is lost on a million of them, and how
    much depends on how gradients are cut into buckets and shards.
    """
    return torch.linalg.vector_norm(values, dtype=torch.float64)


def _split(parameters: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters grouped up to `limit` elements; a larger one stands alone."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not groups or size + parameter.numel() > limit:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.numel()
    return groups

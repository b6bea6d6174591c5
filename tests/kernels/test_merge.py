"""The log-sum-exp merge and its identity; grouped-query head ranges."""

import math

import pytest
import torch

from ringattn.kernels import merge_partial
from ringattn.kernels.heads import head_parts, head_windows
from tests.closeness import assert_close


def test_merge_of_two_halves_is_the_whole(generator: torch.Generator) -> None:
    score = 30 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    value = torch.randn(8, 3, generator=generator, dtype=torch.float64)

    def attend(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        part = score[:, keys]
        return part.softmax(-1) @ value[keys], part.logsumexp(-1)

    out, lse = attend(slice(0, 3))
    merge_partial(out, lse, *attend(slice(3, 8)))
    whole_out, whole_lse = attend(slice(0, 8))
    assert_close("out", whole_out, out, 1e-14)
    assert_close("lse", whole_lse, lse, 1e-14)


@pytest.mark.parametrize("empty", ["accumulator", "part", "both"])
def test_identity_changes_nothing(empty: str) -> None:
    nothing = (torch.zeros(1, 2), torch.full((1,), -math.inf))
    something = (torch.tensor([[2.0, -3.0]]), torch.tensor([5.0]))
    out, lse = (x.clone() for x in (nothing if empty != "part" else something))
    merge_partial(out, lse, *(something if empty == "accumulator" else nothing))
    wanted = nothing if empty == "both" else something
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])


def test_merge_does_not_hide_nan() -> None:
    out, lse = torch.zeros(1, 2), torch.zeros(1)
    merge_partial(out, lse, torch.full((1, 2), math.nan), torch.full((1,), math.nan))
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("group", [1, 2, 4])
def test_head_parts_cover_each_head_once_with_its_key_head(group: int) -> None:
    for h0 in range(9):
        for h1 in range(h0 + 1, 9):
            pairs = []
            for heads, keys in head_parts(h0, h1, group):
                mine = list(range(heads.start, heads.stop))
                share = len(mine) // (keys.stop - keys.start)
                pairs += [(h, keys.start + i // share) for i, h in enumerate(mine)]
            assert pairs == [(h, h // group) for h in range(h0, h1)]


def test_head_windows_cover_all_heads() -> None:
    windows = list(head_windows(12, 3, 2))
    assert windows == [(slice(0, 8), slice(0, 2)), (slice(8, 12), slice(2, 3))]

"""The memory of runs: reused, grown to what was wanted, and never shared by two streams."""

from itertools import pairwise

import pytest
import torch

from ringattn.arena import Arena

CPU = torch.device("cpu")


def _take(arena: Arena, *sizes: int, device: torch.device = CPU) -> list[torch.Tensor]:
    arena.reset(device)
    return [arena.take((size,), torch.float32, device) for size in sizes]


def test_runs_share_one_buffer_of_what_the_last_run_wanted() -> None:
    arena = Arena()
    heap = _take(arena, 100, 3)
    first = _take(arena, 100, 3)
    assert first[0].untyped_storage().data_ptr() == first[1].untyped_storage().data_ptr()
    assert heap[0].untyped_storage().data_ptr() != heap[1].untyped_storage().data_ptr()
    again = _take(arena, 100, 3, 50)
    assert [t.data_ptr() for t in again[:2]] == [t.data_ptr() for t in first]
    grown = _take(arena, 100, 3, 50)
    assert len({t.untyped_storage().data_ptr() for t in grown}) == 1
    for left, right in pairwise(grown):
        assert left.data_ptr() % 64 == 0
        assert left.data_ptr() + 4 * left.numel() <= right.data_ptr()


@pytest.mark.gpu
def test_a_stream_gets_a_buffer_of_its_own() -> None:
    """Nothing orders two streams, so that one may still read what the other would overwrite."""
    device, arena = torch.device("cuda", torch.cuda.current_device()), Arena()
    _take(arena, 1000, device=device)
    (one,) = _take(arena, 1000, device=device)
    (same,) = _take(arena, 1000, device=device)
    assert one.data_ptr() == same.data_ptr()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        (other,) = _take(arena, 1000, device=device)
    assert other.data_ptr() != one.data_ptr()

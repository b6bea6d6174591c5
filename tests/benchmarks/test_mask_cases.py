"""The masks of the suites: parameters, draws, packs."""

import numpy as np
import pytest

from ringattn.benchmarks.suites import mask_cases
from ringattn.benchmarks.suites.mask_cases import (
    KEPT,
    LEAST,
    LONGCA,
    NAMES,
    OURS,
    expanded,
    grid_of,
    is_sampled,
    sampled,
)
from ringattn.errors import UserError

PACKS = 20


@pytest.mark.parametrize("seq_len", [LEAST, 512, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_every_mask_exists_at_every_length(name: str, seq_len: int) -> None:
    found = sampled(name, seq_len)
    assert found.mask.seq_len == seq_len
    assert 0 < found.mask.area <= seq_len**2 * found.mask.layers
    if found.lengths:
        assert sum(found.lengths) == seq_len
    found.mask.head_counts(4)


def test_there_are_fourteen_of_longca_bench_and_the_rest_is_ours() -> None:
    assert len(LONGCA) == 14
    assert not set(LONGCA) & set(OURS)
    assert expanded(["ours", "full", "all"]) == (*OURS, *LONGCA)
    with pytest.raises(UserError, match="longca"):
        expanded(["fulll"])


@pytest.mark.parametrize("name", NAMES)
def test_twenty_packs_differ_where_something_is_drawn_and_repeat(name: str) -> None:
    keys = [sampled(name, 4096, pack).mask.key for pack in range(PACKS)]
    mask_cases._sampled.cache_clear()
    assert keys[7] == sampled(name, 4096, 7).mask.key
    distinct = len(set(keys))  # short documents of whole blocks repeat now and then
    assert distinct >= PACKS // 2 if is_sampled(name) else distinct == 1


def test_kept_shares_of_blocks_are_swept() -> None:
    shares = []
    for pack in range(10):
        found = sampled("blocks_uniform", 8192, pack)
        (matrix,) = found.mask.matrices
        assert matrix.allowed is not None
        shares.append(matrix.allowed.mean())
        assert found.parameters["kept"] == KEPT[pack]
    assert np.allclose(shares, KEPT, atol=0.01)
    sizes = [sampled("blocks_uniform", 8192, pack).parameters["block"] for pack in (0, 10, 20)]
    assert sizes == [64, 128, 64]


def test_variable_blocks_have_their_least_size_and_mean() -> None:
    for pack, mean in enumerate(mask_cases.MEANS):
        (matrix,) = sampled("blocks_variable", 1 << 17, pack).mask.matrices
        sizes = np.diff(matrix.q_edges)
        assert sizes.min() >= 128
        assert 0.7 * mean < sizes.mean() < 1.4 * mean


def test_windows_and_parameters_are_those_of_the_benchmark() -> None:
    two_sided, causal = sampled("window", 8192).mask, sampled("window_causal", 8192).mask
    # |i - j| <= 1024, and 0 <= i - j <= 1024.
    assert two_sided.bands[["lo", "hi"]].tolist() == [(-1024, 1024)]
    assert causal.bands[["lo", "hi"]].tolist() == [(-1024, 0)]
    for pack in range(PACKS):
        assert 1 <= sampled("global_sliding", 8192, pack).parameters["width"] < 8192 // 3
        assert 1 <= sampled("prefix_lm", 8192, pack).parameters["prefix"] < 8192
        blocks = sampled("block_causal_documents", 65536, pack)
        whole = np.array(blocks.lengths[:-1])
        assert ((whole % 1024 == 0) & (whole // 1024 <= 8)).all()


def test_a_grid_has_as_many_tokens_as_the_sequence() -> None:
    assert grid_of(512, 2) == (16, 32)
    assert grid_of(512, 3) == (8, 8, 8)
    assert grid_of(1000, 3) == (10, 10, 10)
    assert grid_of(131, 2) == (1, 131)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="per_head"):
        sampled("nothing", 512)
    with pytest.raises(UserError, match="128"):
        sampled("causal", 64)

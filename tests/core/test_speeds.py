"""Predicted speeds on 64 H100s of 8K tokens each, 64:8 heads: what "auto" is worth."""

import pytest

from ringattn.benchmarks.method_summary import PUBLISHED
from ringattn.benchmarks.method_sweep import Entry, pose
from ringattn.benchmarks.method_table import SHAPES, TOKENS, chosen, masks, measure, single
from ringattn.cost import load_cluster
from ringattn.masks import Mask

RANKS = 64


@pytest.fixture(scope="module")
def table() -> dict[str, Mask]:
    return masks(TOKENS * RANKS)


def published(mask: Mask) -> float:
    """TFLOP/s per rank of the best published way, each on its own layouts."""
    cluster, found = load_cluster("h100_sxm"), []
    for name, places in PUBLISHED.values():
        method, _, stages = name.partition(",stages=")
        for place in places:
            layout, _, chunk = place.partition(",chunk=")
            entry = Entry(
                layout,
                method,
                (("stages", int(stages)),) if stages else (),
                (("chunk", int(chunk)),) if chunk else (),
            )
            posed = pose(entry, mask, SHAPES, RANKS, cluster.ranks_per_node)
            assert posed is not None
            found.append(measure(entry, posed, cluster)["tflops"])
    return max(found)


def test_short_documents(table: dict[str, Mask]) -> None:
    mask = table["short documents"]
    auto = chosen(mask, RANKS, load_cluster("h100_sxm"))["tflops"]
    assert auto >= 400
    assert auto >= 1.4 * published(mask)


def test_a_window_runs_near_the_speed_of_one_rank(table: dict[str, Mask]) -> None:
    cluster = load_cluster("h100_sxm")
    auto = chosen(table["window 1024"], RANKS, cluster)["tflops"]
    assert auto >= 0.9 * single(masks(TOKENS)["window 1024"], cluster)


def test_causal_blockwise(table: dict[str, Mask]) -> None:
    auto = chosen(table["causal blockwise"], RANKS, load_cluster("h100_sxm"))
    assert auto["forward_tflops"] >= 2 * 139
    assert auto["backward_tflops"] >= 1.4 * 242

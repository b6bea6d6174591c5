"""Cluster files: what comes with the package, and what is refused."""

import pytest

from ringattn.cost import Cluster, cluster_names, dump_cluster, load_cluster, parse_cluster
from ringattn.errors import UserError

TEXT = """
name: tiny
peak_tflops: 10
ranks_per_node: 2
nics_per_node: 1
memory_gib: 1
memory_gbs: 100
cores: 4
intra: {gbs: 10, latency_us: 5}
inter: {gbs: 1}
kernel: k
kernels:
  k:
    forward: {tflops: 5}
    backward: {tflops: 4, block_rows: 64}
"""


@pytest.mark.parametrize("name", cluster_names())
def test_shipped_clusters_load_and_stay_below_their_peak(name):
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.source
    for kernel in cluster.kernels.values():
        for curve in (kernel.forward, kernel.backward):
            assert 0 < curve.tflops < cluster.peak_tflops
    assert cluster.inter.gbs <= cluster.intra.gbs
    assert parse_cluster(dump_cluster(cluster), name) == cluster


def test_expected_clusters_are_shipped():
    assert {"h100_sxm", "h200_sxm", "b200", "a100_sxm", "a800_sxm", "cpu_gloo"} <= set(
        cluster_names()
    )


def test_a_file_is_read_by_path(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    cluster = load_cluster(path)
    assert isinstance(cluster, Cluster)
    assert cluster.kernels["k"].backward.block_rows == 64
    assert cluster.intra.gbs == 10.0


@pytest.mark.parametrize(
    "change, message",
    [
        (("peak_tflops: 10", "peak_tflops: 10\npeak_flops: 3"), "peak_flops"),
        (("cores: 4\n", ""), "cores"),
        (("cores: 4", "cores: 4\ncores: 5"), "twice"),
        (("cores: 4", "cores: 4.5"), "type int"),
        (("cores: 4", "cores: true"), "type int"),
        (("gbs: 1}", "gbs: 0}"), "greater than 0"),
        (("latency_us: 5", "latency_us: -5"), "at least 0"),
        (("latency_us: 5", "latency_us: .nan"), "at least 0"),
        (("kernel: k\n", "kernel: fast\n"), "must be one of k"),
        (("{tflops: 5}", "5"), "mapping"),
        (("name: tiny", "name: !!python/object/apply:os.getcwd []"), "not plain YAML"),
        (("name: tiny", "name: [tiny"), "not plain YAML"),
    ],
)
def test_wrong_files_are_refused_with_the_key(change, message):
    with pytest.raises(UserError, match=message):
        parse_cluster(TEXT.replace(*change), "tiny")


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="h100_sxm"):
        load_cluster("h1000")
    with pytest.raises(UserError, match="must be one of k"):
        parse_cluster(TEXT, "tiny").kernel_named("other")

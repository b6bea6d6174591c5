"""The cost model: what a plan costs on a cluster, predicted from the plan alone."""

from ringattn.cost.cluster import Cluster, Curve, Kernel, Link, OnCores
from ringattn.cost.cluster_load import cluster_names, dump_cluster, load_cluster, parse_cluster
from ringattn.cost.memory import peak_bytes
from ringattn.cost.price import price, price_pair, price_survey
from ringattn.cost.priced import Priced
from ringattn.cost.survey import Survey, survey

__all__ = [
    "Cluster",
    "Curve",
    "Kernel",
    "Link",
    "OnCores",
    "Priced",
    "Survey",
    "cluster_names",
    "dump_cluster",
    "load_cluster",
    "parse_cluster",
    "peak_bytes",
    "price",
    "price_pair",
    "price_survey",
    "survey",
]

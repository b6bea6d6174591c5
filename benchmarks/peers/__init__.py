"""Other ways to compute sharded attention, behind one interface: one small adapter per file.

To add a peer, write a class with the members of `base.Contender` and put it into `contenders`.
"""

from ringattn.benchmarks.peers.base import Contender
from ringattn.benchmarks.peers.deepspeed_ulysses import DeepSpeedUlysses
from ringattn.benchmarks.peers.one_process import OneProcess
from ringattn.benchmarks.peers.ours import Ours
from ringattn.benchmarks.peers.zigzag_ring import ZigzagRing
from ringattn.benchmarks.peers.zigzag_varlen import ZigzagVarlen

OURS = Ours("ringattn")
"""ringattn as a user gets it: method and layout "auto"."""
YARDSTICK = OneProcess()


def contenders() -> tuple[Contender, ...]:
    """Those held against `OURS`."""
    return ZigzagRing(), ZigzagVarlen(), DeepSpeedUlysses()


def variants() -> tuple[Contender, ...]:
    """ringattn with a choice that a user may make, for information."""
    return (
        Ours("ringattn, cpu_gloo", cluster="cpu_gloo"),
        Ours("ringattn, ring", method="ring"),
        Ours("ringattn, direct", method="direct"),
        Ours("ringattn, ulysses", method="ulysses"),
    )

"""Other ways to compute sharded attention, behind one interface: one small adapter per file.

To add a peer, write a class with the members of `base.Contender` and put it into `contenders`.
"""

from ringattn.benchmarks.peers.base import Contender
from ringattn.benchmarks.peers.deepspeed_ulysses import DeepSpeedUlysses
from ringattn.benchmarks.peers.lucidrains_ring import LucidrainsRing
from ringattn.benchmarks.peers.magi_attention import MagiAttention
from ringattn.benchmarks.peers.one_process import OneProcess
from ringattn.benchmarks.peers.ours import Ours
from ringattn.benchmarks.peers.ring_flash_attention import RingFlashAttention
from ringattn.benchmarks.peers.torch_context_parallel import TorchContextParallel
from ringattn.benchmarks.peers.transformer_engine import TransformerEngine
from ringattn.benchmarks.peers.usp import USP
from ringattn.benchmarks.peers.zigzag_ring import ZigzagRing
from ringattn.benchmarks.peers.zigzag_varlen import ZigzagVarlen

OURS = Ours("ringattn")
"""ringattn as a user gets it: method and layout "auto"."""
YARDSTICK = OneProcess()


def contenders() -> tuple[Contender, ...]:
    """Those held against `OURS`; what is not installed or not able says so itself."""
    return (
        ZigzagRing(),
        ZigzagVarlen(),
        DeepSpeedUlysses(),
        TorchContextParallel("sdpa"),
        TorchContextParallel("flex"),
        RingFlashAttention(),
        USP(),
        MagiAttention(),
        TransformerEngine("p2p"),
        TransformerEngine("a2a"),
        TransformerEngine("all_gather"),
        LucidrainsRing(),
    )


def variants() -> tuple[Contender, ...]:
    """ringattn with a choice that a user may make, for information."""
    return (
        Ours("ringattn, cpu_gloo", cluster="cpu_gloo"),
        Ours("ringattn, ring", method="ring"),
        Ours("ringattn, direct", method="direct"),
        Ours("ringattn, ulysses", method="ulysses"),
    )

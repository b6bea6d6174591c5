"""Other ways to compute sharded attention, behind one interface: one small adapter per file.

`contenders` names what is compared. To add a peer, write a class with the three members of
`base.Contender` and put it here.
"""

from ringattn.benchmarks.peers.base import Contender
from ringattn.benchmarks.peers.deepspeed_ulysses import DeepSpeedUlysses
from ringattn.benchmarks.peers.ours import Ours
from ringattn.benchmarks.peers.zigzag_ring import ZigzagRing
from ringattn.benchmarks.peers.zigzag_varlen import ZigzagVarlen

OURS = "ringattn"
PEERS = ("zigzag_ring", "zigzag_varlen", "deepspeed_ulysses")


def contenders() -> dict[str, Contender]:
    """All contenders by name: ours as a user gets it, the peers, and ours with a fixed method."""
    found: list[Contender] = [
        Ours(OURS),
        ZigzagRing(),
        ZigzagVarlen(),
        DeepSpeedUlysses(),
        Ours("ringattn cpu_gloo", cluster="cpu_gloo"),
        Ours("ringattn ring", method="ring"),
        Ours("ringattn direct", method="direct"),
        Ours("ringattn ulysses", method="ulysses"),
    ]
    return {contender.name: contender for contender in found}

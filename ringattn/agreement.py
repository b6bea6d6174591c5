"""That all ranks of a group hold the same plan, asked once per plan."""

from collections import OrderedDict

from ringattn.errors import CommunicationError, PlanError
from ringattn.parallel.fabric import Fabric

KEPT = 4096


class Agreements:
    """Which plans the ranks of a group have compared.

    What is remembered follows from the order in which plans were run, which is the same on all
    ranks, and not from which plans are cached, which may differ: so all ranks compare, or none.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()

    def ensure(self, digest: str, fabric: Fabric) -> None:
        """Compares digests across the group unless this one was compared before.

        Every rank of the group calls it when it runs a plan, in the same order.

        Raises:
            PlanError: a rank holds another plan.
            CommunicationError: a rank did not answer.
        """
        if digest not in self._known:
            _compare(digest, fabric)
            self._known[digest] = None
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(digest)


def _compare(digest: str, fabric: Fabric) -> None:
    try:
        strangers = fabric.agree(digest)
    except RuntimeError as error:
        raise CommunicationError(
            f"rank {fabric.rank}: comparing plans before step 0 did not complete: {error}"
        ) from error
    if strangers:
        raise PlanError(
            f"rank {fabric.rank}: ranks {strangers} hold another plan than rank 0; "
            "give every rank the same mask and the same ContextParallel arguments"
        )

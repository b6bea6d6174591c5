"""Where ranks live, as the launcher tells it."""

import os


def ranks_per_node(world: int) -> int:
    """Consecutive ranks that share a node: the launcher's LOCAL_WORLD_SIZE, at most `world`.

    Without a launcher all ranks are taken to share one node.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(local), world) if local.isdigit() and int(local) > 0 else world

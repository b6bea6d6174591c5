"""A process group that whoever made it may destroy at any time."""

import weakref

import torch.distributed as dist


class GroupRef:
    """Refers to a group without keeping it alive. Calling it gives the group.

    Plans and what caches them refer to each other, so that what they hold lives until a garbage
    collection. A gloo group held like that would outlive `destroy_process_group`, and its threads
    with it: one that still drops a finished message while the interpreter ends aborts the process.

    Raises RuntimeError when called after the group's end.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._ref = weakref.ref(group)

    def __call__(self) -> dist.ProcessGroup:
        group = self._ref()
        if group is None:
            raise RuntimeError("the process group of this plan has been destroyed")
        return group

"""Hooks around the gathering of sharded parameters."""

from collections.abc import Callable, Iterable
from typing import Any


def hook_around_gathers(
    modules: Iterable[Any], before: Callable[[], None], after: Callable[[], None]
) -> None:
    """Has `before` and `after` called around the hooks that run before each module's forward.

    Call it once those hooks are there. `after` means that the parameters are there, on a GPU once
    the current stream gets that far.
    """
    for module in modules:
        module.register_forward_pre_hook(lambda *_: before(), prepend=True)
        module.register_forward_pre_hook(lambda *_: after())

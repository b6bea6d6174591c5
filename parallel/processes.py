"""Child processes that act as ranks."""

import os
import threading
from multiprocessing import parent_process


def exit_with_parent() -> None:
    """Ends this rank when the process that started it is gone, even while it waits in a collective.

    Call it in the child. Whoever starts ranks for a test or a measurement leaves none behind.
    """
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()

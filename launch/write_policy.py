"""What a file of a running job that cannot be written means: ``checkpoint.on_error``."""

from collections.abc import Callable
from typing import Literal

from ringattn.errors import UserError
from ringattn.launch.failure import report_line


class WritePolicy:
    """Ends the run, or says so once per file and lets it go on.

    Args:
        on_error: "stop" or "continue".
        warn: shows one line.
    """

    def __init__(
        self,
        on_error: Literal["stop", "continue"] = "stop",
        warn: Callable[[str], None] = report_line,
    ) -> None:
        self._on_error, self._warn = on_error, warn
        self._failing: set[str] = set()

    def failed(self, name: str, error: OSError) -> None:
        """Deals with a failed write.

        Args:
            name: of the file.

        Raises:
            UserError: the policy is to stop.
        """
        rule = f"cannot be written ({error.strerror or error})"
        if self._on_error == "stop":
            raise UserError(name, rule, "free some space and resume") from error
        if name not in self._failing:
            self._failing.add(name)
            self._warn(f"{name}: {rule}; training goes on")

    def worked(self, name: str) -> None:
        """The file could be written: its next failure is said again."""
        self._failing.discard(name)

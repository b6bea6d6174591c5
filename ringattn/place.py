"""Where a rank is in the plan that it runs, for whoever asks from another thread."""

from dataclasses import dataclass


@dataclass
class Place:
    """A rank's place in its plans; the executor moves it on, a monitor reads it.

    Attributes:
        direction: "forward" or "backward"; "" outside of plans.
        step: plan step under way.
        move: tag of the exchange that is being posted or waited for; None during kernels.
        ticks: how often the place changed. It stands still where the rank does.
    """

    direction: str = ""
    step: int = 0
    move: int | None = None
    ticks: int = 0

    def at(self, direction: str, step: int, move: int | None = None) -> None:
        """Moves on to a step of a plan, or to one of its moves."""
        self.direction, self.step, self.move = direction, step, move
        self.ticks += 1

    def leave(self) -> None:
        """The plan's run is over."""
        self.at("", 0)

    def __str__(self) -> str:
        if not self.direction:
            return ""
        move = "" if self.move is None else f" move {self.move}"
        return f"{self.direction} plan step {self.step}{move}"

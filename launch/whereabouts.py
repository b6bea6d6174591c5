"""What a rank is doing, for reports: its phase, its step, its place in a plan."""

from dataclasses import dataclass, field

from ringattn.place import Place


@dataclass
class Whereabouts:
    """What a rank is doing now; its main thread writes, its monitor reads.

    Attributes:
        phase: such as "starting", "training", "saving".
        step: the optimizer step that is being worked on, from 1; 0 before the first.
        watched: a standstill in this phase is a failure; else it may take as long as it likes.
        places: of the contexts whose plans this rank runs.
    """

    phase: str = "starting"
    step: int = 0
    watched: bool = False
    places: list[Place] = field(default_factory=list)
    _entered: int = 0

    def enter(self, phase: str, step: int | None = None, *, watched: bool = False) -> None:
        """Begins a phase, or another round of the same one."""
        self.phase, self.watched = phase, watched
        self.step = self.step if step is None else step
        self._entered += 1

    @property
    def ticks(self) -> int:
        """Grows whenever this rank gets on with something."""
        return self._entered + sum(place.ticks for place in self.places)

    def __str__(self) -> str:
        step = [f"step {self.step}"] if self.step else []
        inside = [text for place in self.places if (text := str(place))]
        return ", ".join([*step, self.phase, *inside])

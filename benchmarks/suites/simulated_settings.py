"""Settings of simulated scaling: the section ``simulated`` of a file in ``configs/bench``."""

from dataclasses import dataclass

from ringattn.benchmarks.scaling_study import doubled
from ringattn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SimulatedSettings:
    """A training step predicted for more and more GPUs.

    Attributes:
        model: a name of ``configs/calibration/models.yaml``.
        cluster: a shipped cluster, or a file, such as one of ``ringattn doctor``.
        gpus: the smallest and the largest number; each is twice the one before.
        group: most ranks that share a sequence.
        masks: names of `mask_cases`. lengths: of their documents.
        methods: names, or "all".
        weak: tokens of a GPU.
        strong_seq_len, strong_sequences: of a step, whatever the number of GPUs.
    """

    model: str = "llama3-8b"
    cluster: str = "h100_sxm"
    gpus: tuple[int, int] = (8, 4096)
    group: int = 64
    masks: tuple[str, ...] = (
        "full", "causal", "documents_causal", "shared_question", "window_causal",
    )  # fmt: skip
    lengths: str = "log_uniform"
    methods: tuple[str, ...] = ("all",)
    weak: int = 16384
    strong_seq_len: int = 1 << 20
    strong_sequences: int = 64

    def counts(self) -> list[int]:
        """Numbers of GPUs. Raises UserError for sizes that cannot be."""
        for name in ("group", "weak", "strong_seq_len", "strong_sequences"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"simulated.{name}={getattr(self, name)}", "must be positive", "pass 1 or more"
                )
        return doubled(*self.gpus)

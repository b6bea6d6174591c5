"""End to end: training steps of ringattn, plain PyTorch and DeepSpeed Ulysses, side by side.

Every contender trains the same model from the same weights with the same optimizer on the same
sequences, as many per step, in ranks of its own. One whose losses differ from those of plain
PyTorch is reported as wrong, and has no figures.
"""

from collections.abc import Sequence

import torch

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.settings import Settings
from ringattn.benchmarks.suites.train_settings import TrainSettings
from ringattn.benchmarks.training.comparison import Comparison
from ringattn.benchmarks.training.contenders import REFERENCE, Contender, contenders
from ringattn.benchmarks.training.ours import Ours
from ringattn.benchmarks.training.peak import peak_rate
from ringattn.launch.job import COMPUTE_DTYPES, prepare_corpus

NAME = "bench.train"


def run(settings: Settings, recorder: Recorder, show: Progress) -> None:
    """Measures what is not recorded yet, one record per contender.

    Args:
        settings: of all suites. Without ``common.peers`` ours and plain PyTorch in one process run,
            against which losses are held.
        recorder: where records go; what it holds is not measured again.
        show: is told what is being done, and how much there is.

    Raises:
        UserError: settings that nothing can be measured with.
    """
    rivals = contenders(settings.train.contenders)
    if not settings.common.peers:
        rivals = [one for one in rivals if isinstance(one, Ours) or one.name == REFERENCE]
    measure(settings.train, rivals, recorder, show, settings.command("train"))


def measure(
    settings: TrainSettings,
    rivals: Sequence[Contender],
    recorder: Recorder,
    show: Progress,
    command: str,
) -> None:
    """As `run`, for given contenders; `command` measures this again."""
    for case in settings.cases():
        config = case.config(1, {})
        what = f"{settings.config}-{config.data.seq_len}x{case.packs}-{config.train.dtype}"
        prefix = f"{what}-{settings.warm_up}+{settings.steps}steps-{case.ranks}ranks"
        missing = [one for one in rivals if not recorder.has(NAME, f"{prefix}-{one.name}")]
        if not missing:
            continue
        show.expect(len(missing))
        prepare_corpus(config)
        on_gpu = config.run.device != "cpu" and torch.cuda.is_available()
        device, dtype = "cuda" if on_gpu else "cpu", COMPUTE_DTYPES[config.train.dtype]
        comparison = Comparison(
            case=case,
            name=NAME,
            prefix=prefix,
            device=device,
            peak=peak_rate(device, case.ranks, case.threads, dtype),
            tolerance=settings.tolerance_of(config),
            timeout=settings.timeout_s,
            command=command,
            recorder=recorder,
            show=show,
        )
        for together in [missing] if settings.interleaved else [[one] for one in missing]:
            comparison.run(together)

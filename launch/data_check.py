"""Refuses impossible values under ``data``."""

import itertools
import math

from ringattn.errors import UserError
from ringattn.launch.config import Config, DataConfig


def check_data(config: Config) -> None:
    """Checks curriculum, mixture and lengths; needs no corpus.

    Raises:
        UserError: naming key, value, rule and fix.
    """
    data = config.data
    _check_curriculum(data)
    for path, weight in data.corpora:
        if not 0 < weight < math.inf:
            raise UserError(
                f"data.mixture: weight {weight} of {path}",
                "must be positive and finite",
                "leave that corpus out, or give it a share such as 0.1",
            )
    if data.long_repeats > 1 and data.long_document is None:
        raise UserError(
            f"data.long_repeats={data.long_repeats}",
            "needs data.long_document",
            "set it to the tokens from which a document is long, e.g. 8192",
        )
    cp = config.parallel.cp
    lengths = {"data.seq_len": data.seq_len}
    lengths["data.curriculum's shortest"] = min(length for _, length in data.stages)
    for name, length in lengths.items():
        if cp > length:
            raise UserError(
                f"parallel.cp={cp}",
                f"must not exceed {name}={length}",
                f"set parallel.cp to at most {length}",
            )


def _check_curriculum(data: DataConfig) -> None:
    stages = [list(stage) for stage in data.stages]
    steps = [step for step, _ in stages]
    if steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise UserError(
            f"data.curriculum={stages}",
            "must begin at step 0 and go on at rising steps",
            "write e.g. [[0, 2048], [200, 8192]]",
        )
    if min(length for _, length in stages) < 2:
        raise UserError(
            f"data.curriculum={stages}", "sequences need at least 2 tokens", "use e.g. 2048"
        )

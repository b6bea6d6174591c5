"""Learning rate over a run."""

import math

from ringattn.launch.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Rate of the optimizer step number `step` (0 is the first).

    Rises linearly to `lr` over `warmup_steps` steps, then follows half a cosine down to `min_lr` at
    the last step (arXiv:1608.03983 without restarts).
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    span = max(1, train.steps - 1 - train.warmup_steps)
    progress = min(1.0, (step - train.warmup_steps) / span)
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

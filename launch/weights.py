"""Where a run's first weights come from."""

from ringattn.launch.config import Config
from ringattn.launch.hf_weights import HFWeights
from ringattn.launch.model import Fill, random_weights
from ringattn.launch.model_config import ModelConfig


def weight_source(config: Config, shape: ModelConfig) -> Fill:
    """What fills each parameter before the first step: ``model.hf``, or the seed.

    Parameters may be filled in any order, sharded or whole, one at a time.

    Raises:
        UserError: the checkpoint is missing, broken, or does not fit the shape.
    """
    if config.model.hf is None:
        return random_weights(shape, config.seed)
    return HFWeights(config.model.hf, shape)

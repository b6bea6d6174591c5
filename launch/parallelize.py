"""Everything that is applied to the one-device model from outside, in one fixed order."""

from ringattn.launch.config import Config
from ringattn.launch.layer_memory import apply_memory
from ringattn.launch.model import Transformer
from ringattn.parallel.mesh import TrainMesh


def parallelize(model: Transformer, config: Config, mesh: TrainMesh) -> None:
    """Changes the model in place, as ``memory``, ``train.compile`` and ``parallel`` say.

    1. Layer memory and compilation, inside each layer's forward.
    2. Sharding around each layer, whose hooks gather its parameters before that forward: so one
       gather serves a layer and its recomputation, and no hook lies inside a compiled part.

    DeepSpeed shards when its own engine is made, after this; here it learns what a layer is.

    Args:
        model: as built, its parameters not yet in an optimizer; on the meta device for fsdp.
        config: the run.
        mesh: the ranks. No communication for ddp and deepspeed.
    """
    # 1. Layer memory and compilation.
    apply_memory(model, config)
    # 2. Sharding.
    parallel = config.parallel
    if parallel.engine == "fsdp":
        from ringattn.parallel.fsdp import shard_layers

        shard_layers(
            model,
            model.model.layers,
            mesh.world_mesh(),
            bf16=config.train.dtype == "bf16",
            reshard=parallel.reshard,
            offload=parallel.offload == "parameters",
        )
    elif parallel.engine == "deepspeed" and parallel.zero_stage == 3:
        from ringattn.parallel.zero import mark_layers

        mark_layers(model.model.layers)

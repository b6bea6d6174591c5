"""DeepSpeed ZeRO on process groups that exist already, without noise.

DeepSpeed is imported when it is wanted. It keeps state in its modules (accelerator, communication
backend, group of all ranks) and reads environment variables; `deepspeed_on` sets both for as long
as an engine lives, and puts them back.
"""

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ringattn.errors import UserError

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ZeroOptions:
    """How DeepSpeed shards.

    Attributes:
        stage: 1 shards the optimizer, 2 gradients too, 3 parameters too.
        bf16: parameters are bfloat16 over float32 master weights; gradients add up and travel in
            float32.
        offload_optimizer, offload_parameters: these live in host memory; parameters in stage 3.
        accumulate: backward passes per step.
        clip_norm: as in `ringattn.launch.config.TrainConfig`.
        compiled: parts of the model are compiled.
    """

    stage: int
    bf16: bool
    offload_optimizer: bool
    offload_parameters: bool
    accumulate: int
    clip_norm: float
    compiled: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def config(self) -> dict[str, Any]:
        """DeepSpeed's own configuration."""
        # Gradients travel in buckets of 200 MB, not of 2 GB.
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": 50_000_000}
        if self.stage == 3:
            # Nothing stays gathered: every parameter is gathered with its layer and let go.
            zero["stage3_param_persistence_threshold"] = 0
            zero["stage3_max_reuse_distance"] = 0
            # Replaces `F.linear` by one that does not keep gathered weights for the backward. What
            # a compiled layer keeps is the compiler's choice.
            zero["memory_efficient_linear"] = not self.compiled
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.clip_norm,
            "steps_per_print": None,
            # Where DeepSpeed skips an update itself, gradients offloaded in stages 1 and 2 stay in
            # its buffers and spoil the next step; `guard_updates` needs no such check.
            "bf16": {"enabled": self.bf16, "check_grad_overflow": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            # Updates in host memory are PyTorch's own: DeepSpeed's need a compiler at run time.
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }


def require_deepspeed() -> None:
    """Refuses to go on without DeepSpeed; does not import it.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("deepspeed") is None:
        raise UserError(
            "parallel.engine=deepspeed",
            "needs the package deepspeed",
            "pip install 'ringattn[deepspeed]', or set parallel.engine=fsdp",
        )


@contextmanager
def deepspeed_on(device: torch.device, group: dist.ProcessGroup) -> Iterator[ModuleType]:
    """DeepSpeed, imported and pointed at the device and the group of all ranks while inside.

    Everything that makes or uses sharded modules or engines belongs inside. No communication.

    Raises:
        UserError: it is not installed.
    """
    require_deepspeed()
    local = {"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(device.index or 0)}
    if (other := "OMPI_COMM_WORLD_LOCAL_RANK") in os.environ:
        local[other] = local["LOCAL_RANK"]  # it insists that both are equal
    with _environment(local), warnings.catch_warnings():
        # It calls collectives by names that PyTorch is giving up.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
        with quiet():
            import deepspeed
            from deepspeed.accelerator import get_accelerator, set_accelerator
            from deepspeed.utils import groups

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            accelerator: Any = get_accelerator()
            if accelerator.device_name() != device.type:
                accelerator = _accelerator(device.type)
                set_accelerator(accelerator)
            # On a CPU it would compile collectives over shared memory when first used.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            # A group of its own would wait half an hour for a missing rank, whatever the run says.
            groups._WORLD_GROUP = group
            deepspeed.comm.init_distributed(
                dist_backend=accelerator.communication_backend_name(),
                auto_mpi_discovery=False,
                dist_init_required=False,
            )
        linear = F.linear
        try:
            yield deepspeed
        finally:
            F.linear = linear
            groups._WORLD_GROUP = None
            deepspeed.comm.comm.cdb = None


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what is printed, and what is logged below errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def build_sharded(
    deepspeed: ModuleType, make: Callable[[], ModelT], options: ZeroOptions
) -> ModelT:
    """A model whose parameters are sharded one module at a time while it is made (stage 3)."""
    # It reads the dtype from the configuration; one given as an argument it may override.
    with deepspeed.zero.Init(config_dict_or_path=options.config()):
        return make()


def mark_layers(layers: Iterable[nn.Module]) -> None:
    """Makes DeepSpeed gather each of these modules as a whole, with no hooks inside."""
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)


def open_zero(
    deepspeed: ModuleType, model: nn.Module, optimizer: torch.optim.Optimizer, options: ZeroOptions
) -> Any:
    """The `deepspeed.DeepSpeedEngine` of a model. Every rank calls it; gradients become means."""
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=options.config(), dist_init_required=False
    )[0]


def guard_updates(optimizer: torch.optim.Optimizer, allowed: Callable[[], bool]) -> None:
    """Makes ``optimizer.step`` do nothing when `allowed` says no, which it is asked each time.

    The engine around it then writes back the weights that it has, and clears gradients as ever.
    """
    update = optimizer.step

    def step(closure: Any = None) -> Any:
        return update(closure) if allowed() else None

    # On the instance: DeepSpeed takes only optimizers of the classes that it knows.
    vars(optimizer)["step"] = step


def _accelerator(device_type: str) -> Any:
    if device_type == "cuda":
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator as Accelerator
    else:
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator as Accelerator
    return Accelerator()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a moment: DeepSpeed has no other way to be told."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value

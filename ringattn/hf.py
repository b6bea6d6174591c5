"""Context parallelism for any decoder of Hugging Face `transformers`, without changing it.

    from ringattn import hf

    parallel = hf.attach(model, mesh["cp"])
    batch = parallel.shard(input_ids, labels=input_ids, document_lengths=[5000, 3192])
    loss = hf.loss(model, batch)          # or model(**batch).loss, which makes all logits
    loss.backward()
    parallel.sum_gradients()
    print(parallel.sum(loss.detach()))    # the loss of the whole batch

Every rank of the group calls this with the same whole batch. Its loss is the sum over its own
tokens divided by the counted tokens of all ranks: losses and gradients are summed over the group,
never averaged. With data parallelism beside it, pass `num_items_in_batch` counted over all ranks
and micro-batches of the step, and sum gradients over all ranks:

- FSDP2 over all dp × cp ranks: shard `hf.CausalLoss(model)` with `fully_shard`, then
  `set_gradient_divide_factor(1.0)` and `set_force_sum_reduction_for_comms(True)` on every module.
- DDP over all dp × cp ranks averages: wrap `hf.CausalLoss(model)` and multiply the loss by the
  number of ranks before the backward.

`transformers` is imported when `attach` is called, and only here.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ringattn.context import ContextParallel
from ringattn.errors import UserError
from ringattn.hf_attention import NAME, BatchPlans, LayerMask, attend, describe, document_mask
from ringattn.hf_batch import IGNORE, check_batch, find_documents, shift_labels
from ringattn.hf_checks import check_head, check_model, layer_masks
from ringattn.kernels.linear_loss import linear_cross_entropy

_BUCKET_BYTES = 32 * 2**20


def attach(
    model: nn.Module, group: "DeviceMesh | dist.ProcessGroup | int | None" = None, **options: Any
) -> "Attached":
    """Makes a model attend over all ranks of a group.

    Registers an attention function and a mask function with `transformers`, under the name
    "ringattn", and selects them on this model. What the layers attend is read from the model at
    run time: causal or not, sliding windows (Mistral, Gemma 2), softcap (Gemma 2), sinks
    (GPT-OSS), scaling. Gradient checkpointing of `transformers` runs attention again, which works.

    Args:
        model: a `PreTrainedModel` with attention over text; not wrapped in anything yet.
        group: the ranks that share each sequence; a one-axis mesh, a group, or None for all. A
            number of simulated ranks can shard and plan, not run.
        **options: of `ringattn.ContextParallel` (method, layout, kernel, cluster, ...); heads and
            head_dim are the model's.

    Raises:
        UserError: a model with layers, positions or outputs that look across tokens by other ways
            than full, causal or windowed attention.
    """
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(
            f"model of type {type(model).__name__}",
            "must be a transformers.PreTrainedModel",
            "attach before wrapping it in DDP, FSDP, PEFT or torch.compile",
        )
    config: Any = model.config.get_text_config()
    check_model(model, config)
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, describe)
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise UserError(
            type(model).__name__, f"takes no other attention ({error})", "use another model"
        ) from None
    heads: int = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cp = ContextParallel(group, heads=(heads, kv_heads), head_dim=head_dim, **options)
    return Attached(model, cp, layer_masks(config))


class Attached:
    """A model and the group over which it attends; made by `attach`.

    Attributes:
        model: the model.
        cp: its `ContextParallel`.
    """

    def __init__(self, model: nn.Module, cp: ContextParallel, layer_masks: list[LayerMask]) -> None:
        self.model, self.cp = model, cp
        self._layer_masks = layer_masks

    def shard(
        self,
        input_ids: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        document_lengths: Sequence[int] | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: int | None = None,
    ) -> dict[str, Any]:
        """This rank's part of a batch, as keyword arguments of the model. No communication.

        Labels are shifted here, on the whole sequence. A document's first token is no label.

        Args:
            input_ids: int64 (B, S), the whole batch, the same on every rank of the group.
            labels: int64 (B, S), unshifted as `transformers` takes them, -100 where not counted;
                None gives no loss.
            document_lengths: of the documents packed in a row, the same in every row; they do not
                attend each other. By default they begin where `position_ids` do not continue.
            position_ids: int64 (S,), (1, S) or (B, S); by default counted from each document's
                start.
            num_items_in_batch: what the loss is divided by; by default the labels of this batch
                that count, those of all ranks.

        Returns:
            input_ids, position_ids, use_cache, ringattn (the plans); with labels also labels,
            shift_labels and num_items_in_batch.

        Raises:
            UserError: shapes that do not fit, rows with different documents, or a layout that
                leaves a rank without tokens.
        """
        check_batch(input_ids, labels)
        lengths, positions = find_documents(input_ids, document_lengths, position_ids)
        plans = self._plans(lengths)
        shard = next(iter(plans.plans.values())).shard
        batch: dict[str, Any] = {
            "input_ids": shard(input_ids),
            "position_ids": shard(positions),
            "use_cache": False,
            "ringattn": plans,
        }
        if labels is not None:
            shifted = shift_labels(labels, lengths)
            # The loss is skipped without `labels`, and reads `shift_labels`.
            batch["labels"] = batch["shift_labels"] = shard(shifted)
            if num_items_in_batch is None:
                num_items_in_batch = max(int((shifted != IGNORE).sum()), 1)
            batch["num_items_in_batch"] = num_items_in_batch
        return batch

    def _plans(self, lengths: tuple[int, ...]) -> BatchPlans:
        stack = self.cp.plans([document_mask(lengths, mask) for mask in self._layer_masks])
        layout = stack[0].layout
        if int(layout.sizes.min()) == 0:
            raise UserError(
                f"layout {layout.name} of {layout.seq_len} tokens",
                f"leaves a rank of {layout.world} without tokens, which transformers cannot run",
                'pass longer sequences, or attach(..., layout="zigzag")',
            )
        known = dict(zip(self._layer_masks, stack, strict=True))
        return BatchPlans(self.cp, lengths, layout, known)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the group, on every rank; not differentiable."""
        self.cp.require_ranks("sum")
        total = value.detach().clone()
        dist.all_reduce(total, group=self.cp.group)
        return total

    def sum_gradients(self) -> None:
        """Sums the model's gradients over the group, in place. Every rank calls it.

        For models that nothing else shards or replicates; FSDP and DDP do it by themselves. A
        parameter without a gradient on this rank counts as 0 where another rank has one, and keeps
        None where no rank has, as on one device. 16-bit gradients are summed in float32 and
        rounded once.
        """
        self.cp.require_ranks("sum_gradients")
        grads: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for parameter in self._parameters_with_gradients():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            grads.setdefault((dtype, parameter.device), []).append(parameter.grad)
        for (dtype, _), same in grads.items():
            for bucket in _buckets(same, dtype):
                flat = torch.cat([grad.flatten().to(dtype) for grad in bucket])
                dist.all_reduce(flat, group=self.cp.group)
                parts = flat.split([grad.numel() for grad in bucket])
                for grad, part in zip(bucket, parts, strict=True):
                    grad.copy_(part.view_as(grad))

    def _parameters_with_gradients(self) -> list[nn.Parameter]:
        """Those that have a gradient on any rank; the same on every rank, by one all-reduce."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            return []
        mine = [int(p.grad is not None) for p in trained]
        flags = torch.tensor(mine, dtype=torch.int32, device=trained[0].device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.cp.group)
        return [p for p, flag in zip(trained, flags.tolist(), strict=True) if flag]


class CausalLoss(nn.Module):
    """A causal language model whose forward is `loss`; what to wrap in FSDP2 or DDP.

    Args:
        model: with an output head.

    Attributes:
        model: the same.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> torch.Tensor:
        """See `loss`."""
        return loss(self.model, batch)


def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Summed cross entropy of this rank's tokens over `num_items_in_batch`, without all logits.

    The same value as ``model(**batch).loss``. Output head and cross entropy run together on some
    tokens at a time (`ringattn.kernels.linear_cross_entropy`), and the final softcap with them.

    Args:
        model: attached, with an output head of one matrix.
        batch: from `Attached.shard`, with labels.

    Returns:
        A float32 scalar; all ranks of the group communicate in attention.

    Raises:
        UserError: no labels, or an output head that does more than a matrix and a softcap.
    """
    batch = dict(batch)
    if batch.pop("labels", None) is None:
        raise UserError("a batch without labels", "has no loss", "pass labels to shard")
    labels, counted = batch.pop("shift_labels"), batch.pop("num_items_in_batch")
    decoder: Any = model
    head = decoder.get_output_embeddings()
    config = decoder.config.get_text_config()
    check_head(decoder, head, config)
    hidden = decoder.base_model(**batch).last_hidden_state
    total = linear_cross_entropy(
        hidden.flatten(0, -2),
        head.weight,
        labels.flatten(),
        bias_V=head.bias,
        ignore_index=IGNORE,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    return total / counted


def _buckets(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Consecutive tensors of about `_BUCKET_BYTES` each, counted in `dtype`."""
    buckets: list[list[torch.Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * dtype.itemsize
        if size and size + nbytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += nbytes
    return buckets

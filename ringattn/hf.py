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

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ringattn.context import ContextParallel
from ringattn.errors import UserError, brief
from ringattn.hf_attention import NAME, BatchPlans, LayerMask, attend, describe, document_mask
from ringattn.kernels.linear_loss import linear_cross_entropy

IGNORE = -100
_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "proportional")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_BUCKET_BYTES = 32 * 2**20


def attach(
    model: nn.Module, group: "DeviceMesh | dist.ProcessGroup | None" = None, **options: Any
) -> "Attached":
    """Makes a model attend over all ranks of a group.

    Registers an attention function and a mask function with `transformers`, under the name
    "ringattn", and selects them on this model. What the layers attend is read from the model at
    run time: causal or not, sliding windows (Mistral, Gemma 2), softcap (Gemma 2), sinks
    (GPT-OSS), scaling. Gradient checkpointing of `transformers` runs attention again, which works.

    Args:
        model: a `PreTrainedModel` with attention over text; not wrapped in anything yet.
        group: the ranks that share each sequence; a one-axis mesh, a group, or None for all.
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
    _check_model(model, config)
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
    return Attached(model, cp, _layer_masks(config))


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
        _check_batch(input_ids, labels)
        lengths, positions = _documents(input_ids, document_lengths, position_ids)
        plans = self._plans(lengths)
        shard = next(iter(plans.plans.values())).shard
        batch: dict[str, Any] = {
            "input_ids": shard(input_ids),
            "position_ids": shard(positions),
            "use_cache": False,
            "ringattn": plans,
        }
        if labels is not None:
            shifted = labels.clone()
            shifted[:, torch.tensor(lengths).cumsum(0)[:-1]] = IGNORE
            shifted = nn.functional.pad(shifted[:, 1:], (0, 1), value=IGNORE)
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
        parameter without a gradient on this rank counts as 0.
        """
        self.cp.require_ranks("sum_gradients")
        grads: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.setdefault((parameter.dtype, parameter.device), []).append(parameter.grad)
        for same in grads.values():
            for bucket in _buckets(same):
                flat = torch.cat([grad.flatten() for grad in bucket])
                dist.all_reduce(flat, group=self.cp.group)
                parts = flat.split([grad.numel() for grad in bucket])
                for grad, part in zip(bucket, parts, strict=True):
                    grad.copy_(part.view_as(grad))


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
    _check_head(decoder, head, config)
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


def _check_model(model: nn.Module, config: Any) -> None:
    """Refuses what looks across tokens elsewhere than in attention."""
    whole: Any = model
    types = set(getattr(config, "layer_types", None) or ())
    strange = [f"layer type {kind}" for kind in sorted(types - set(_LAYER_TYPES))]
    strange += [
        f"{type(module).__name__} {name}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.RNNBase)
    ]
    if getattr(config, "attention_chunk_size", None) and "chunked_attention" in types:
        strange.append("chunked attention")
    if getattr(model, "_is_stateful", False):
        strange.append("a state that is carried over tokens")
    if whole.config.is_encoder_decoder:
        strange.append("cross attention")
    strange += [f"rope_type {kind}" for kind in _rope_types(config) if kind not in _ROPE_TYPES]
    for key in ("output_attentions", "output_router_logits"):
        if getattr(config, key, False):
            strange.append(f"{key}=True")
    takes = inspect.signature(model.forward).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes):
        strange.append("a forward without **kwargs")
    if not whole._can_set_attn_implementation():
        strange.append("attention of its own, which cannot be replaced")
    if strange:
        raise UserError(
            f"{type(model).__name__} with {strange[0]}",
            "is not implemented across ranks",
            "use a decoder with full, causal or windowed attention",
        )


def _rope_types(config: Any) -> list[str]:
    """Kinds of rotary scaling; some follow the longest position at hand."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [entry["rope_type"] for entry in each if "rope_type" in entry]


def _layer_masks(config: Any) -> list[LayerMask]:
    """What each layer will ask for, as far as the configuration tells: the layout is chosen by it.

    A wrong guess costs time, not correctness.
    """
    if not getattr(config, "is_causal", True):
        return [LayerMask(causal=False)] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [LayerMask(window=window)] * config.num_hidden_layers
    return [LayerMask(window=window if kind == _LAYER_TYPES[1] else None) for kind in types]


def _check_head(model: Any, head: Any, config: Any) -> None:
    scaled = [
        f"{key}={brief(value)}"
        for key, value in config.to_dict().items()
        if re.search(r"logits?_(scal|mult)|lm_head_mult", key) and value not in (None, 1, 1.0)
    ]
    if not isinstance(head, nn.Linear) or scaled or model.base_model is model:
        raise UserError(
            f"the output head of {type(model).__name__} {' '.join(scaled)}".rstrip(),
            "must be one matrix with at most a softcap",
            "use model(**batch).loss",
        )


def _check_batch(input_ids: torch.Tensor, labels: torch.Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise UserError(
            f"input_ids of shape {list(input_ids.shape)}", "must be (B, S)", "add a batch dimension"
        )
    if labels is not None and labels.shape != input_ids.shape:
        raise UserError(
            f"labels of shape {list(labels.shape)}",
            f"must have the shape of input_ids, {list(input_ids.shape)}",
            "pass unshifted labels, one per token",
        )


def _documents(
    input_ids: torch.Tensor, lengths: Sequence[int] | None, positions: torch.Tensor | None
) -> tuple[tuple[int, ...], torch.Tensor]:
    """(document lengths, positions (B, S)) from whichever of the two is given."""
    batch, seq_len = input_ids.shape
    if positions is not None:
        positions = positions.to(input_ids.device).expand(batch, -1)
        if positions.shape != input_ids.shape:
            raise UserError(
                f"position_ids of {positions.shape[1]} tokens",
                f"must be for {seq_len} tokens",
                "pass the positions of the whole sequence",
            )
    if lengths is None:
        starts = torch.zeros(1, dtype=torch.int64)
        if positions is not None:
            breaks = positions[:, 1:] != positions[:, :-1] + 1
            if bool((breaks != breaks[:1]).any()):
                raise UserError(
                    "position_ids whose rows hold different documents",
                    "rows share one plan",
                    "pack all documents in one row, or pass one row at a time",
                )
            starts = torch.cat([starts, breaks[0].nonzero().flatten().cpu() + 1])
        lengths = torch.diff(starts, append=torch.tensor([seq_len])).tolist()
    found = tuple(int(length) for length in lengths)
    if sum(found) != seq_len or min(found, default=0) < 1:
        raise UserError(
            f"document_lengths={brief(list(found))}",
            f"must be positive and sum to {seq_len}",
            "pass the lengths of one row's documents, in order",
        )
    if positions is None:
        counts = [torch.arange(length, device=input_ids.device) for length in found]
        positions = torch.cat(counts).expand(batch, -1)
    return found, positions


def _buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Consecutive tensors of about `_BUCKET_BYTES` each."""
    buckets: list[list[torch.Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size and size + tensor.nbytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.nbytes
    return buckets

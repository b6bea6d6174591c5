"""Output head and cross entropy in one operator, without the logits of all tokens.

    loss = sum over counted tokens of  log(sum_v exp z_v) - z_label,   z = cap(hidden W' + bias)
    dz   = (softmax(z) - onehot(label)) * cap'(z)
    dhidden = dz W,   dW = dz' hidden,   dbias = sum of dz

Tokens pass by in chunks. A chunk's logits become its loss and, in place, dz, from which its part of
the gradients follows at once; the backward only multiplies them by the incoming gradient (Hsu et
al., Liger Kernel, arXiv 2410.10989, section 3.2). That takes three matrix products where computing
logits again in the backward takes four, and the gradients held in between are those that the
backward of a loss needs first anyhow. Where no gradient is asked for, none is computed. Chunks are
of tokens alone: blocks of classes would need every logit twice, for the sum and for the gradient.

PyTorch's own chunked `linear_cross_entropy` (as of 2.13) is not used: it returns the sum in the
dtype of `hidden`, so that a float16 sum of 8K tokens is infinite and a bfloat16 one is wrong by per
cents; adds up a 16-bit weight gradient in 16 bits; computes tokens that do not count; and knows
neither softcap nor autocast. `benchmarks/linear_loss.py` measures both.
"""

import math
from typing import Any

import torch

from ringattn.errors import UserError
from ringattn.kernels.linear_products import add_weight_grad, hidden_grad, logits_into
from ringattn.kernels.merge import accumulator_dtype

LOGITS = 1 << 26
"""Logits held at once, 256 MiB in float32, or half the number of weights if that is more."""


def linear_cross_entropy(
    hidden_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    counted: int | None = None,
    rows: int | None = None,
) -> torch.Tensor:
    """Sum over the counted tokens of -log softmax(hidden W' + bias)[label]. No communication.

    Products take operands in the dtype of `hidden_NC`, or autocast's where that is on; logits, loss
    and gradients are float32 (float64 for float64 inputs), gradients are rounded to their tensor's
    dtype once, after the incoming gradient has scaled them. No token, or none that counts, gives
    an exact zero whose gradients are exact zeros.

    Works under `torch.compile` (one opaque operator) and activation checkpointing. The backward
    may run once; second derivatives are refused.

    Args:
        hidden_NC: (N, C), floating point; N may be 0.
        weight_VC: (V, C).
        labels_N: int64 (N,), in [0, V) or `ignore_index`.
        bias_V: (V,).
        ignore_index: label of tokens that do not count; nothing is computed for them.
        softcap: logits become softcap * tanh(logits / softcap).
        counted: how many labels count, where the caller knows. Without it a CUDA device is asked,
            and the host waits for the answer. Too low a number gives a loss of NaN.
        rows: tokens per chunk; by default as many as `LOGITS` allows.

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        UserError: shapes, dtypes or devices do not fit, or, on the CPU, a label is out of range.
        RuntimeError: the backward runs twice, or with ``create_graph=True``.
    """
    _check(hidden_NC, weight_VC, labels_N, bias_V, softcap, counted, rows)
    wanted = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden_NC, weight_VC, bias_V)
    ]
    return _linear_cross_entropy(
        hidden_NC,
        weight_VC,
        labels_N,
        bias_V,
        ignore_index,
        softcap or 0.0,
        -1 if counted is None else counted,
        rows or _rows_at_once(*weight_VC.shape, grad=any(wanted)),
        _operand_dtype(hidden_NC),
        *wanted,
    )[0]


def _check(hidden, weight, labels, bias, softcap, counted, rows) -> None:
    shapes = [tuple(x.shape) for x in (hidden, weight, labels)]
    if [len(s) for s in shapes] != [2, 2, 1] or shapes[0] != (shapes[2][0], shapes[1][1]):
        raise UserError(
            f"hidden {shapes[0]}, weight {shapes[1]}, labels {shapes[2]}",
            "must be (N, C), (V, C) and (N,)",
            "flatten batch and tokens into N",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(
            f"bias {tuple(bias.shape)}", f"must be ({len(weight)},)", "pass one number per class"
        )
    floating = [x for x in (hidden, weight, bias) if x is not None]
    if labels.dtype != torch.int64 or not all(x.dtype.is_floating_point for x in floating):
        raise UserError(
            f"labels {labels.dtype}, hidden, weight and bias {[x.dtype for x in floating]}",
            "labels are int64 and the others floating point",
            "convert them",
        )
    if any(x.device != hidden.device for x in (labels, *floating)):
        raise UserError(
            f"labels on {labels.device}, hidden, weight and bias on "
            f"{[str(x.device) for x in floating]}",
            "all tensors lie on one device",
            "move them",
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise UserError(f"softcap={softcap}", "must be positive and finite", "pass None for no cap")
    if counted is not None and not 0 <= counted <= len(labels):
        raise UserError(
            f"counted={counted}", f"must be between 0 and {len(labels)} labels", "pass None"
        )
    if rows is not None and rows < 1:
        raise UserError(f"rows={rows}", "must be at least 1", "pass None")


def _operand_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _rows_at_once(classes: int, dim: int, *, grad: bool) -> int:
    """Enough rows that reading and writing dW once per chunk is cheap beside the products."""
    return max(1, LOGITS // max(1, classes), dim // 2 if grad else 0)


def _in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    softcap: float,
    counted: int,
    rows: int,
    operand: torch.dtype,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, and dhidden, dweight, dbias for an incoming gradient of 1; (0,) where not wanted."""
    wide = accumulator_dtype(hidden.dtype)
    keep = labels != ignore_index
    _check_range(labels, keep, len(weight))
    index = _counted_rows(keep, counted)
    dhidden = hidden.new_zeros(hidden.shape if want_hidden else 0, dtype=wide)
    dweight = weight.new_zeros(weight.shape if want_weight else 0, dtype=wide)
    dbias = weight.new_zeros(len(weight) if want_bias else 0, dtype=wide)
    loss = hidden.new_zeros((), dtype=wide)
    grad = want_hidden or want_weight or want_bias
    # float16 products are slow on CPUs.
    narrow = wide if operand == torch.float16 and hidden.device.type == "cpu" else operand

    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(operand)
        count = len(labels) if index is None else len(index)
        buffer = weight.new_empty((min(rows, count), len(weight)), dtype=wide)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            place = part if index is None else index[part]
            x = hidden[place].to(operand)
            logits = buffer[: len(x)]
            logits_into(logits, x, weight)
            if bias is not None:
                logits += bias
            loss += loss_step(logits, labels[place], keep[place], softcap, grad=grad)
            if not grad:
                continue
            if want_bias:
                dbias += logits.sum(0)
            dlogits = logits.to(narrow)
            if want_hidden:
                dhidden[place] = hidden_grad(dlogits, weight, wide)
            if want_weight:
                add_weight_grad(dweight, dlogits, x.to(narrow))
    if counted >= 0:
        loss.masked_fill_(keep.sum() > counted, float("nan"))
    return loss, dhidden, dweight, dbias


_linear_cross_entropy = torch.library.custom_op(
    "ringattn::linear_cross_entropy", _in_chunks, mutates_args=()
)


@_linear_cross_entropy.register_fake
def _(hidden, weight, labels, bias, *settings):
    wide = accumulator_dtype(hidden.dtype)
    want_hidden, want_weight, want_bias = settings[-3:]
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if want_hidden else 0, dtype=wide),
        weight.new_empty(weight.shape if want_weight else 0, dtype=wide),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=wide),
    )


def _check_range(labels: torch.Tensor, keep: torch.Tensor, classes: int) -> None:
    if labels.device.type != "cpu":  # elsewhere the gather itself ends the process
        return
    wrong = labels[keep & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise UserError(
            f"label {int(wrong[0])}", f"must be in [0, {classes}) or ignored", "correct the labels"
        )


def _counted_rows(keep: torch.Tensor, counted: int) -> torch.Tensor | None:
    """Places of the tokens that count; None when all do."""
    if counted < 0:
        index = keep.nonzero().squeeze(1)
        return None if len(index) == len(keep) else index
    if counted == len(keep):
        return None
    # Of known length, so that the host need not wait: a stable sort puts them in front.
    return torch.sort(keep, descending=True, stable=True).indices[:counted]


def loss_step(
    logits: torch.Tensor,
    labels: torch.Tensor,
    keep: torch.Tensor,
    softcap: float = 0.0,
    *,
    grad: bool = True,
) -> torch.Tensor:
    """Loss sum of a chunk, whose logits (R, V) become d loss / d logits in place.

    Rows that `keep` excludes have neither loss nor gradient, whatever their label. Without `grad`
    the logits are used up for nothing. softcap 0 is none.
    """
    target = labels.where(keep, 0).unsqueeze(1)
    weight = keep.unsqueeze(1).to(logits.dtype)
    slope = None
    if softcap:
        logits.div_(softcap).tanh_()
        slope = logits.square().neg_().add_(1) if grad else None
        logits.mul_(softcap)
    logits.sub_(logits.amax(1, keepdim=True))
    picked = logits.gather(1, target)
    total = logits.exp_().sum(1, keepdim=True)
    if grad:
        logits.mul_(weight / total)
        logits.scatter_add_(1, target, -weight)
        if slope is not None:
            logits.mul_(slope)
    return total.log_().sub_(picked).mul_(weight).sum()


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors = inputs[0], inputs[1], inputs[3]
    ctx.dtypes = [x.dtype if wanted else None for x, wanted in zip(tensors, inputs[-3:])]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros as large as the hidden states and the weight
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, dloss: torch.Tensor, *_: torch.Tensor) -> tuple:
    traced = torch.compiler.is_compiling() or type(dloss) is not torch.Tensor
    if torch.is_grad_enabled() and not traced:
        raise RuntimeError("linear_cross_entropy: no second derivatives; drop create_graph=True")

    def scaled(grad: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
        if dtype is None:
            return None
        # In place, for a second weight gradient may be the largest tensor of a step. Autograd
        # refuses a second run, because what it saved has changed.
        return (grad * dloss if traced else grad.mul_(dloss)).to(dtype)

    dhidden, dweight, dbias = map(scaled, ctx.saved_tensors, ctx.dtypes)
    return dhidden, dweight, None, dbias, *[None] * 8


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)

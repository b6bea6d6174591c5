"""A whole batch for a `transformers` model: its documents, positions and shifted labels."""

from collections.abc import Sequence

import torch
from torch import nn

from ringattn.errors import UserError, brief

IGNORE = -100


def shift_labels(labels: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(B, S): each token's label is the next token's; a document's first token is none."""
    shifted = labels.clone()
    shifted[:, torch.tensor(lengths).cumsum(0)[:-1]] = IGNORE
    return nn.functional.pad(shifted[:, 1:], (0, 1), value=IGNORE)


def check_batch(input_ids: torch.Tensor, labels: torch.Tensor | None) -> None:
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


def find_documents(
    input_ids: torch.Tensor, lengths: Sequence[int] | None, positions: torch.Tensor | None
) -> tuple[tuple[int, ...], torch.Tensor]:
    """(document lengths, positions (B, S)) from whichever of the two is given."""
    batch, seq_len = input_ids.shape
    if positions is not None:
        if tuple(positions.shape) not in ((seq_len,), (1, seq_len), (batch, seq_len)):
            raise UserError(
                f"position_ids of shape {list(positions.shape)}",
                f"must be (S,), (1, S) or (B, S) for {batch} rows of {seq_len} tokens",
                "pass the positions of the whole sequence",
            )
        positions = positions.to(input_ids.device).expand(batch, -1)
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

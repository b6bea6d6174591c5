"""Masks by the names that tables of results give them."""

import re
from functools import lru_cache

import numpy as np

import ringattn as ra
from ringattn.benchmarks.calibration_rows import masks_for, typical_packs
from ringattn.masks import Mask

WINDOW, BLOCK, SPARSE = 1024, 1024, 0.4
_CAUSAL = r"causal|tril|lower.?tri|autoregressive"


@lru_cache(maxsize=256)
def masks_named(source: str, name: str, seq_len: int, gpus: int) -> tuple[Mask, ...]:
    """The masks that a figure is the mean over; names that nobody knows stand for causal.

    Lengths of documents are those of the source where it is known, else of MagiAttention's
    histogram. A window's width is the last number of its name, else 1,024.
    """
    text, kind = _plain(name), kind_named(name)
    if kind in ("full", "causal", "doc_full", "doc_causal"):
        return masks_for(source, kind, seq_len, gpus)
    numbers = [int(part) for part in re.findall(r"\d+", text)]
    if kind == "window":
        window = min(numbers[-1] if numbers else WINDOW, seq_len - 1)
        return (ra.masks.sliding_window(seq_len, window, 0 if "full" not in text else window),)
    if kind == "window_two_sided":
        window = min(numbers[-1] if numbers else WINDOW, seq_len - 1)
        return (ra.masks.sliding_window(seq_len, window, window),)
    if kind == "block_sparse":  # some of the causal blocks, where nothing is said
        share = numbers[-1] / 100 if numbers and numbers[-1] < 100 else SPARSE
        window = max(1, int(seq_len * (1 - (1 - share) ** 0.5)))
        return (ra.masks.sliding_window(seq_len, window, 0),)
    if kind == "global_sliding":
        return (ra.masks.global_sliding(seq_len, numbers[-1] if numbers else seq_len // 6),)
    if kind == "prefix_lm":
        return (ra.masks.prefix_lm(seq_len, seq_len // 2),)
    return tuple(_of_documents(kind, [int(n) for n in part]) for part in typical_packs(seq_len))


def _of_documents(kind: str, lengths: list[int]) -> Mask:
    if kind == "shared_question":
        return ra.masks.shared_question(lengths)
    if kind == "causal_blockwise":
        return ra.masks.causal_blockwise(lengths)
    if kind == "prefix_lm_documents":
        return ra.masks.prefix_lm_documents(lengths, max(1, int(np.mean(lengths)) // 2))
    return ra.masks.block_causal_documents(lengths, BLOCK)


def is_known(name: str) -> bool:
    """Whether a mask's name says what it is; `kind_named` takes any other for causal."""
    return kind_named(name) != "causal" or re.search(_CAUSAL, _plain(name)) is not None


def kind_named(name: str) -> str:
    """The kind of mask that a name stands for; case, blanks and dashes do not matter."""
    text = _plain(name)
    documents = re.search(r"doc|varlen|packed", text) is not None
    if re.search(r"window|swa|sliding", text):
        if "global" in text:
            return "global_sliding"
        return "window" if "causal" in text or "swa" in text else "window_two_sided"
    if "sparse" in text:
        return "block_sparse"
    if "shared" in text:
        return "shared_question"
    if "prefix" in text:
        return "prefix_lm_documents" if documents else "prefix_lm"
    if "blockwise" in text:
        return "causal_blockwise"
    if documents and "block" in text:
        return "block_causal_documents"
    if documents:
        return "doc_full" if "full" in text or "non" in text or "bidir" in text else "doc_causal"
    if re.search(r"full|bidir|non.?causal|dense|none", text):
        return "full"
    return "causal"


def group_named(name: str) -> str:
    """What errors are reported by: "dense", "documents" or "other masks"."""
    kind = kind_named(name)
    if kind in ("full", "causal"):
        return "dense"
    return "documents" if kind in ("doc_full", "doc_causal") else "other masks"


def _plain(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.strip().lower())

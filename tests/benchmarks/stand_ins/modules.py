"""Stand-ins of the peers' packages: their documented functions and layouts, over `whole`.

Signatures are those of ring-flash-attn 0.1.8, yunchang 0.6.4, MagiAttention 1.1 (May 2026) and
TransformerEngine 2.20. What their adapters must do is what the real packages ask of a caller.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.benchmarks.stand_ins.whole import attend_whole, causal_or_window, dense, zigzag

OPEN = (-1, -1)


def _all(seq_len: int) -> list[torch.Tensor]:
    return list(torch.arange(seq_len).chunk(dist.get_world_size()))


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members, __version__="0.0")
    return module


def flash_attn_func(q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None,
                    causal: bool = False) -> torch.Tensor:  # fmt: skip
    """Stand-in of `flash_attn.flash_attn_func`."""
    rows, keys = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
    return dense(q, k, v, causal_or_window(causal, OPEN)(rows, keys))


def zigzag_ring_flash_attn_func(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None,
    causal: bool = False, window_size: Any = OPEN, group: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Stand-in; asks for the zigzag layout and for causal."""
    assert causal
    world = dist.get_world_size()
    tokens = [zigzag(q.shape[1] * world, r, world) for r in range(world)]
    return attend_whole(q, k, v, tokens, causal_or_window(causal, window_size))


def ring_flash_attn_func(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None,
    causal: bool = False, window_size: Any = OPEN, group: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Stand-in; asks for the contiguous layout."""
    tokens = _all(q.shape[1] * dist.get_world_size())
    return attend_whole(q, k, v, tokens, causal_or_window(causal, window_size))


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: torch.Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Any, ...]:
    """Stand-in: offsets of the rank's queries and of the keys that they need."""
    assert cu_seqlens.dtype == torch.int32
    edges = cu_seqlens.tolist()
    rows = edges[-1] // world_size
    first, stop = rank * rows, (rank + 1) * rows
    q, k, start = [0], [0], None
    for a, b in pairwise(edges):
        if a < stop and b > first:
            start = a if start is None else start
            q.append(min(b, stop) - first)
            k.append((min(b, stop) if causal else b) - start)
    assert start is not None
    offsets = [torch.tensor(x, dtype=torch.int32) for x in (q, k)]
    longest = [int(x.diff().max()) for x in offsets]
    return *offsets, *longest, slice(start, start + k[-1])


def llama3_flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, heads_k_stride: int, local_k_slice: slice, dropout_p: float = 0.0,
    softmax_scale: Any = None, causal: bool = False, window_size: Any = OPEN, group: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Stand-in: document by document, aligned at the bottom right, keys from `local_k_slice`."""
    assert k.shape[1] % heads_k_stride == 0
    held = local_k_slice
    rows = q.shape[0]
    edges_q, edges_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    document = torch.full((2, rows * dist.get_world_size()), -1)
    place = torch.zeros_like(document)
    first = dist.get_rank() * rows
    for n, (a, b, c, d) in enumerate(
        zip(edges_q[:-1], edges_q[1:], edges_k[:-1], edges_k[1:], strict=True)
    ):
        document[0, first + a : first + b] = document[1, held.start + c : held.start + d] = n
        place[0, first + a : first + b] = torch.arange(d - c - (b - a), d - c)
        place[1, held.start + c : held.start + d] = torch.arange(d - c)
    inside = causal_or_window(causal, window_size)

    def allowed(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (document[0, i] == document[1, j]) & inside(place[0, i], place[1, j])

    return attend_whole(q[None], k[None], v[None], _all(document.shape[1]), allowed)[0]


class LongContextAttention(torch.nn.Module):
    """Stand-in of yunchang's layer; degrees are global state, as in the package."""

    degrees: tuple[int, int] = (1, 1)

    def __init__(self, ring_impl_type: str = "basic", attn_type: Any = None) -> None:
        super().__init__()
        self.kind = ring_impl_type

    def forward(self, query: Any, key: Any, value: Any, dropout_p: float = 0.0,
                softmax_scale: Any = None, causal: bool = False, window_size: Any = OPEN,
                ) -> torch.Tensor:  # fmt: skip
        """Needs the ranks' tokens to lie as the extractor deals them out."""
        assert causal or self.kind == "basic"
        assert key.shape[2] % self.degrees[0] == 0
        whole = torch.arange(query.shape[1] * dist.get_world_size())
        tokens = [_extract(self.kind, whole, r) for r in range(dist.get_world_size())]
        allowed = causal_or_window(causal, window_size)
        return attend_whole(query, key, value, tokens, allowed)


def _set_seq_parallel_pg(ulysses: int, ring: int, rank: int, world_size: int) -> None:
    assert ulysses * ring == world_size == dist.get_world_size()
    assert rank == dist.get_rank()
    LongContextAttention.degrees = ulysses, ring


def _extract(kind: str, value: torch.Tensor, rank: int) -> torch.Tensor:
    """Tokens of a rank (dim 0)."""
    heads, ring = LongContextAttention.degrees
    if kind == "basic":
        return value.chunk(heads * ring)[rank]
    chunks, place = value.chunk(2 * ring), rank // heads
    return torch.cat([chunks[place], chunks[2 * ring - 1 - place]]).chunk(heads)[rank % heads]


def _extractor(kind: str) -> Any:
    def extract(value: torch.Tensor, rank: int, world_size: int, rd: int, ud: int) -> Any:
        assert (ud, rd) == LongContextAttention.degrees
        return _extract(kind, value[0], rank)[None]

    return extract


def _magi_key(**values: Any) -> SimpleNamespace:
    assert values["pad_size"] == 0
    assert values["total_seqlen_q"] == values["total_seqlen_k"]
    assert values["cp_group_or_mesh"] is dist.group.WORLD
    return SimpleNamespace(**values)


def _magi_tokens(key: SimpleNamespace, rank: int) -> torch.Tensor:
    """Three chunks a rank, dealt out in turns from the end; the last ones may be padding."""
    world, total = dist.get_world_size(), key.total_seqlen_q
    chunk = -(-total // (3 * world))
    chunks = torch.arange(3 * world * chunk).view(-1, chunk).flip(0)[rank::world]
    tokens = chunks.reshape(-1)
    return tokens.masked_fill(tokens >= total, -1)


def _magi_dispatch(x: torch.Tensor, key: Any, pad_value: float = 0.0) -> torch.Tensor:
    tokens = _magi_tokens(key, dist.get_rank())
    padding = (tokens < 0).view(-1, *[1] * (x.ndim - 1))
    return x[tokens.clamp_min(0)].masked_fill(padding, pad_value)


def _magi_calc_attn(q: Any, k: Any, v: Any, key: Any) -> tuple[torch.Tensor, None]:
    def allowed(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        count = torch.zeros_like(i - j)
        for (a, b), (c, d), kind in zip(
            key.q_ranges, key.k_ranges, key.attn_mask_type, strict=True
        ):
            inside = (i >= a) & (i < b) & (j >= c) & (j < d)
            if kind in ("causal", "bi_causal"):
                inside &= j - i <= d - b
            if kind in ("inv_causal", "bi_causal"):
                inside &= j - i >= c - a
            count += inside
        assert count.max() <= 1  # slices must not overlap
        return count > 0

    tokens = [_magi_tokens(key, rank) for rank in range(dist.get_world_size())]
    return attend_whole(q[None], k[None], v[None], tokens, allowed)[0], None


def _flex_flash_attn_func(q: Any, k: Any, v: Any, q_ranges: Any, k_ranges: Any,
                          attn_type_map: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    assert q_ranges.dtype == k_ranges.dtype == attn_type_map.dtype == torch.int32
    every = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    return dense(q[None], k[None], v[None], every)[0], None


class DotProductAttention(torch.nn.Module):
    """Stand-in of TransformerEngine's module, with the layout that it documents."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.format, self.kind, self.window = qkv_format, attn_mask_type, window_size or OPEN
        self.comm: str | None = None

    def set_context_parallel_group(self, cp_group: Any, cp_global_ranks: Any, cp_stream: Any,
                                   cp_comm_type: str = "p2p") -> None:  # fmt: skip
        """As the package's."""
        assert list(cp_global_ranks) == list(range(dist.get_world_size(cp_group)))
        self.comm = cp_comm_type

    def forward(self, query_layer: Any, key_layer: Any, value_layer: Any,
                cu_seqlens_q: Any = None, cu_seqlens_kv: Any = None,
                cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None,
                ) -> torch.Tensor:  # fmt: skip
        """Output (..., heads * D), as the package's."""
        inside = causal_or_window("causal" in self.kind, self.window)
        q, k, v = query_layer, key_layer, value_layer
        if self.comm is None:
            rows = torch.arange(q.shape[1])
            return dense(q, k, v, inside(rows[:, None], rows[None])).flatten(2)
        world = dist.get_world_size()
        if self.format == "bshd":
            assert self.window == OPEN or self.comm != "p2p"
            tokens = [zigzag(q.shape[1] * world, r, world) for r in range(world)]
            return attend_whole(q, k, v, tokens, inside).flatten(2)
        assert self.format == "thd"
        assert self.kind.startswith("padding")
        tokens, document = _packed(cu_seqlens_q.tolist(), cu_seqlens_q_padded.tolist(), world)

        def allowed(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return inside(i, j) & (document[i] == document[j])

        return attend_whole(q[None], k[None], v[None], tokens, allowed)[0].flatten(1)


def _packed(
    real: list[int], padded: list[int], world: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every rank's tokens where each padded document is dealt out as two chunks a rank."""
    tokens: list[list[torch.Tensor]] = [[] for _ in range(world)]
    document = torch.zeros(real[-1], dtype=torch.int64)
    for n, (a, b, c, d) in enumerate(
        zip(real[:-1], real[1:], padded[:-1], padded[1:], strict=True)
    ):
        assert (d - c) % (2 * world) == 0
        slots = torch.arange(a, a + d - c)
        slots[b - a :] = -1
        document[a:b] = n
        for rank in range(world):
            tokens[rank].append(slots[zigzag(d - c, rank, world)])
    return [torch.cat(parts) for parts in tokens], document


@contextmanager
def stand_ins() -> Iterator[None]:
    """Puts all stand-ins into `sys.modules` inside the block."""
    ranges = SimpleNamespace(from_ranges=lambda pairs: [tuple(pair) for pair in pairs])
    modules = [
        _module("flash_attn", flash_attn_func=flash_attn_func),
        _module(
            "ring_flash_attn",
            zigzag_ring_flash_attn_func=zigzag_ring_flash_attn_func,
            ring_flash_attn_func=ring_flash_attn_func,
            llama3_flash_attn_prepare_cu_seqlens=llama3_flash_attn_prepare_cu_seqlens,
            llama3_flash_attn_varlen_func=llama3_flash_attn_varlen_func,
        ),
        _module(
            "yunchang",
            LongContextAttention=LongContextAttention,
            set_seq_parallel_pg=_set_seq_parallel_pg,
            EXTRACT_FUNC_DICT={kind: _extractor(kind) for kind in ("basic", "zigzag")},
        ),
        _module("yunchang.kernels", AttnType=SimpleNamespace(FA="fa")),
        _module("magi_attention"),
        _module("magi_attention.common", AttnRanges=ranges),
        _module(
            "magi_attention.api",
            magi_attn_flex_key=_magi_key,
            dispatch=_magi_dispatch,
            calc_attn=_magi_calc_attn,
            flex_flash_attn_func=_flex_flash_attn_func,
        ),
        _module("transformer_engine"),
        _module("transformer_engine.pytorch", DotProductAttention=DotProductAttention),
    ]
    with patch.dict("sys.modules", {module.__name__: module for module in modules}):
        yield

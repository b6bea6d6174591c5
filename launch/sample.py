"""Text generation on one device with a key-value cache."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ringattn.errors import UserError
from ringattn.launch.model import Transformer
from ringattn.launch.tokenizer import Tokenizer

_LEAST_ROWS = 512  # of a window's rows that are computed together


class CachedAttention:
    """Dense causal attention of one layer that remembers all earlier keys and values.

    Called with the next T tokens of one growing sequence, in order; it is an `Attend` callable.

    Args:
        capacity: most tokens the sequence will ever hold; the cache is allocated once.
        window: tokens that a token attends, itself included; None for all before it.
    """

    def __init__(self, capacity: int, window: int | None = None) -> None:
        self.capacity, self.window = capacity, window
        self.length = 0
        self._k_BKTD: torch.Tensor | None = None
        self._v_BKTD: torch.Tensor | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (B,T,H,D), k and v (B,T,K,D) of the new tokens -> (B,T,H,D)."""
        start, stop = self.length, self.length + q.shape[1]
        if stop > self.capacity:
            raise ValueError(f"{stop} tokens in a cache for {self.capacity}")
        if self._k_BKTD is None or self._v_BKTD is None:
            shape = (k.shape[0], k.shape[2], self.capacity)
            self._k_BKTD = k.new_empty(*shape, k.shape[3])
            self._v_BKTD = v.new_empty(*shape, v.shape[3])
        self._k_BKTD[:, :, start:stop] = k.transpose(1, 2)
        self._v_BKTD[:, :, start:stop] = v.transpose(1, 2)
        self.length = stop
        # Rows of a window see few keys: a few rows at a time need no mask of all keys.
        rows = q.shape[1] if self.window is None else max(self.window, _LEAST_ROWS)
        parts = [
            self._rows(part.transpose(1, 2), start + number * rows)
            for number, part in enumerate(q.split(max(rows, 1), dim=1))
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _rows(self, q_BHTD: torch.Tensor, start: int) -> torch.Tensor:
        """Attention of the rows from `start` on over the keys that they see."""
        assert self._k_BKTD is not None
        assert self._v_BKTD is not None
        count, stop = q_BHTD.shape[2], start + q_BHTD.shape[2]
        first = 0 if self.window is None else max(0, start - self.window + 1)
        cut = self.window is not None and stop - first > self.window
        mask = None
        if count > 1 and (start or cut):  # aligned to the last key, which is_causal would not be
            ahead = torch.arange(first, stop, device=q_BHTD.device)
            ahead = ahead - torch.arange(start, stop, device=q_BHTD.device)[:, None]
            mask = ahead <= 0
            if self.window is not None:
                mask &= ahead > -self.window
        return F.scaled_dot_product_attention(
            q_BHTD,
            self._k_BKTD[:, :, first:stop],
            self._v_BKTD[:, :, first:stop],
            attn_mask=mask,
            is_causal=mask is None and count > 1,
            enable_gqa=True,
        )


def pick(
    logits_V: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """One token id drawn from softmax(logits / temperature) over the `top_k` likeliest.

    temperature 0 takes the likeliest (the lowest id among equals). Drawn on the CPU in float64,
    so that a seed gives the same text on every device up to the logits' own rounding.
    """
    logits_V = logits_V.detach().to("cpu", torch.float64)
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))


@torch.no_grad()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> str:
    """Continues `prompt` until an end-of-document token or `tokens` new ones.

    Runs on the device that holds the model's parameters, with dense causal attention.

    Args:
        model: unsharded, on one device.
        tokenizer: the one the model was trained with.
        prompt: at least one token long.
        tokens: most new tokens.
        temperature: 0 for the likeliest token, otherwise the divisor of the logits.
        top_k: draw among the k likeliest only; None draws among all.
        seed: of the draws.
        on_token: called with each new token id as it is drawn.

    Returns:
        The continuation, without the prompt.

    Raises:
        UserError: an empty prompt, values out of range, or more tokens than the model can hold.
    """
    ids = [int(i) for i in tokenizer.encode(prompt)]
    _check(model, ids, tokens=tokens, temperature=temperature, top_k=top_k)
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    caches = [CachedAttention(len(ids) + tokens, window) for window in model.cfg.windows]
    new: list[int] = []
    feed, start = ids, 0
    while len(new) < tokens:
        feed_BT = torch.tensor([feed], device=device)
        positions_T = torch.arange(start, start + len(feed), device=device)
        hidden_BTC = model(feed_BT, positions_T, caches, hidden=True)
        token = pick(model.lm_head(hidden_BTC[0, -1]), temperature, top_k, generator)
        if token == tokenizer.eos_id:
            break
        new.append(token)
        if on_token is not None:
            on_token(token)
        start, feed = start + len(feed), [token]
    return tokenizer.decode(new)


def _check(
    model: Transformer, ids: list[int], *, tokens: int, temperature: float, top_k: int | None
) -> None:
    if not ids:
        raise UserError("prompt=''", "must hold at least one token", "pass a few words of text")
    if tokens < 0:
        raise UserError(f"tokens={tokens}", "must not be negative", "use 0 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(
            f"temperature={temperature}", "must be 0 or more and finite", "use 0.8, or 0 for greedy"
        )
    if top_k is not None and top_k < 1:
        raise UserError(
            f"top_k={top_k}",
            "must be at least 1",
            "use 50, or 0 on the command line for all tokens",
        )
    if max(ids) >= model.cfg.vocab_size:
        raise UserError(
            f"token id {max(ids)} of the prompt",
            f"must be below the model's vocab_size={model.cfg.vocab_size}",
            "use the tokenizer that the model was trained with",
        )
    limit = model.cfg.max_seq_len
    if len(ids) + tokens > limit:
        raise UserError(
            f"prompt of {len(ids)} tokens + {tokens} new",
            f"must fit model.max_seq_len={limit}",
            f"ask for at most {max(limit - len(ids), 0)} new tokens",
        )

"""Needles: synthetic keys with values, stated somewhere in real text and asked for later.

The text around them is a haystack of tokens from a prepared corpus. Everything is drawn from a
given generator, so that equal seeds make equal documents.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.tokenizer import Tokenizer

_STATED = 0.4  # share of a document's needles that state a new key; the others ask for an old one


@dataclass(frozen=True, kw_only=True)
class NeedleFormat:
    """How a needle reads.

    Attributes:
        statement: text that states a needle, with {key} and, after it, {value}.
        question: text that asks for it, likewise; the model has to continue it at {value}.
        keys, values: characters that keys and values are drawn from. With a single key there is
            one value to look up, a pass key.
        key_length, value_length: characters of each.

    Raises:
        UserError: a template without both places, or nothing to draw from.
    """

    statement: str = "\nThe number of {key} is {value}.\n"
    question: str = "\nThe number of {key} is {value}.\n"
    keys: str = "BCDFGHJKLMNPQRSTVWXZ"
    key_length: int = 4
    values: str = "0123456789"
    value_length: int = 5

    def __post_init__(self) -> None:
        for name in ("statement", "question"):
            text: str = getattr(self, name)
            once = text.count("{key}") == text.count("{value}") == 1
            if not once or text.index("{key}") > text.index("{value}"):
                raise UserError(
                    f"needle {name}={text!r}",
                    "must hold {key} once and {value} once after it",
                    f"write e.g. {NeedleFormat.statement!r}",
                )
        for name, least in (("keys", 1), ("values", 2)):
            if len(set(getattr(self, name))) < least or getattr(self, name[:-1] + "_length") < 1:
                raise UserError(
                    f"needle {name}={getattr(self, name)!r}",
                    f"must hold at least {least} different character(s), drawn at least once",
                    "use e.g. 0123456789",
                )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "NeedleFormat":
        """Inverse of `dataclasses.asdict`."""
        return cls(**{name: raw[name] for name in asdict(cls())})


@dataclass(frozen=True)
class Needle:
    """A key and its value."""

    key: str
    value: str


@dataclass(frozen=True)
class Haystack:
    """A sequence that ends with a question whose answer stands earlier in it.

    Attributes:
        tokens: int64 (length,); its last tokens are the value.
        answer: tokens of the value.
        needle: what is stated and asked for.
    """

    tokens: np.ndarray
    answer: int
    needle: Needle


class NeedleWriter:
    """Draws needles and writes them into haystacks, as tokens.

    Values are tokenized apart from the text before and after them, so that a value has the same
    tokens wherever it stands.

    Args:
        fmt: how needles read.
        tokenizer: of the haystacks and the model.
        rng: source of every draw.
    """

    def __init__(self, fmt: NeedleFormat, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
        self.fmt, self._tokenizer, self._rng = fmt, tokenizer, rng

    def draw(self, taken: set[str]) -> Needle | None:
        """A needle whose key is not taken, and takes it; None when no key was found."""
        fmt = self.fmt
        for _ in range(64):
            key = self._text(fmt.keys, fmt.key_length)
            if key not in taken:
                taken.add(key)
                return Needle(key, self._text(fmt.values, fmt.value_length))
        return None

    def _text(self, characters: str, length: int) -> str:
        return "".join(characters[i] for i in self._rng.integers(len(characters), size=length))

    def encode(self, template: str, needle: Needle) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of a template before the value, of the value, and after it."""
        before, after = template.split("{value}")
        texts = (before.replace("{key}", needle.key), needle.value, after)
        parts = [self._tokenizer.encode(text).astype(np.int64) for text in texts]
        return parts[0], parts[1], parts[2]

    def document(self, haystack: np.ndarray, length: int, every: int) -> np.ndarray:
        """Training text: haystack with statements and questions at random places, `length` tokens.

        Questions ask for any key stated before, from one token away to the whole document.

        Args:
            haystack: at least `length` tokens.
            length: tokens of the result.
            every: mean tokens of haystack between needles, of which there are two at least.
        """
        texts: list[np.ndarray] = []
        stated: list[Needle] = []
        taken: set[str] = set()
        used = 0
        while len(texts) < 2 or used + every * len(texts) < length:
            new = not stated or self._rng.random() < _STATED
            needle = self.draw(taken) if new else None
            template = self.fmt.question if needle is None else self.fmt.statement
            if needle is None:
                needle = stated[int(self._rng.integers(len(stated)))]
            else:
                stated.append(needle)
            texts.append(np.concatenate(self.encode(template, needle)))
            used += len(texts[-1])
        cuts = np.sort(self._rng.integers(0, max(length - used, 0) + 1, len(texts))).tolist()
        parts: list[np.ndarray] = []
        for start, stop, text in zip([0, *cuts], cuts, texts, strict=False):
            parts += [haystack[start:stop], text]
        return np.concatenate([*parts, haystack[cuts[-1] :]])[:length]

    def haystack(
        self, haystack: np.ndarray, length: int, depth: float, distractors: int
    ) -> Haystack:
        """A test: one needle at a depth, distractors anywhere, the question at the end.

        Args:
            haystack: at least `length` tokens.
            length: tokens of the result.
            depth: 0 states the needle at the beginning, 1 right before the question.
            distractors: other keys stated in the haystack; never asked for.

        Raises:
            UserError: the length has no room for needle and question.
        """
        taken: set[str] = set()
        needle = self.draw(taken)
        assert needle is not None, "the first key is always free"
        others = [self.draw(taken) for _ in range(distractors)]
        stated = [
            np.concatenate(self.encode(self.fmt.statement, n))
            for n in (needle, *others)
            if n is not None
        ]
        before, value, _ = self.encode(self.fmt.question, needle)
        room = length - len(before) - len(value) - sum(map(len, stated))
        if room < 0:
            raise UserError(
                f"needle length {length}",
                f"has no room for the question and {len(stated)} needles",
                f"use at least {length - room} tokens, or fewer distractors",
            )
        places = [round(depth * room), *self._rng.integers(0, room + 1, len(stated) - 1).tolist()]
        parts: list[np.ndarray] = []
        at = 0
        for number in np.argsort(places, kind="stable").tolist():
            parts += [haystack[at : places[number]], stated[number]]
            at = places[number]
        parts += [haystack[at:room], before, value]
        return Haystack(np.concatenate(parts), len(value), needle)

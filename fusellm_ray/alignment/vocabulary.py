"""Which target token a teacher's bytes become: the projection of one vocabulary onto another.

In: two vocabularies as bytes. Out: int32 tables that the kernels of `project.py` index.
`whole[id]` is the target id of a teacher token, `suffix[start[id] + skip]` that of its bytes from `skip` on
(a target boundary inside the token), `at_start[id]` that of its bytes where a text begins. The last two are
filled as texts ask for them: the kernel names what it misses, and `VocabularyMap.resolve` looks it up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fusellm_ray.alignment.edit_distance import Strings, nearest
from fusellm_ray.errors import TokenizerError

NOWHERE = -1  # no target token: the mass goes to the residual
UNRESOLVED = -2  # not asked for yet

# A mid-text token is what follows one of these, if the target's tokenizer cuts there.
_ANCHORS = ("\n", "!", "。", "0", "a")


class Tokens(Protocol):
    """Ids and byte end offsets of one text, without special tokens."""

    @property
    def ids(self) -> NDArray[np.int32]: ...
    @property
    def ends(self) -> NDArray[np.int32]: ...


class Vocabulary(Protocol):
    """What alignment needs to know of a tokenizer; `corpus.tokens.ByteTokenizer` is one."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def token_bytes(self) -> Sequence[bytes | None]: ...
    @property
    def strips_leading_space(self) -> bool: ...
    def encode_each(self, texts: Sequence[str]) -> Sequence[Tokens | TokenizerError]: ...


@dataclass(frozen=True, slots=True)
class ByteTable:
    """All token bytes in one array: token i is flat[start[i]:start[i + 1]]; specials are empty."""

    flat: NDArray[np.uint8]
    start: NDArray[np.int32]
    lead: NDArray[np.int32]
    """Bytes of each token that the start of a text swallows: 1 for "▁foo" of SentencePiece, else 0."""

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> ByteTable:
        parts = text_tokens(vocabulary)
        start = np.zeros(len(parts) + 1, np.int32)
        np.cumsum([len(part) for part in parts], out=start[1:])
        swallows = vocabulary.strips_leading_space
        lead = np.array([swallows and part.startswith(b" ") for part in parts], np.int32)
        return cls(np.frombuffer(b"".join(parts), np.uint8), start, lead)


def text_tokens(vocabulary: Vocabulary) -> list[bytes]:
    """Bytes of every id; b"" for specials, unused and padding ids, which no text and no edit may reach."""
    special = vocabulary.special_ids
    return [b"" if part is None or i in special else part for i, part in enumerate(vocabulary.token_bytes)]


def string_of(token: bytes) -> str:
    """A token's string without its ▁/Ġ marker, as the paper compares them; stray bytes are letters too."""
    return token.replace(b" ", b"").decode("utf-8", errors="surrogateescape")


def same_tokens(a: Vocabulary, b: Vocabulary) -> bool:
    """Whether ids mean the same in both; models of one family may pad them to different sizes."""
    shared = min(a.vocab_size, b.vocab_size)
    longer = a if a.vocab_size > b.vocab_size else b
    return (
        (a.bos_id, a.eos_id, a.strips_leading_space) == (b.bos_id, b.eos_id, b.strips_leading_space)
        and a.special_ids == b.special_ids
        and list(a.token_bytes[:shared]) == list(b.token_bytes[:shared])
        and all(part is None for part in longer.token_bytes[shared:])
    )


class TargetIndex:
    """Finds target tokens by bytes. `at_start` asks for the token as it is where a text begins."""

    def __init__(self, target: Vocabulary) -> None:
        self._target = target
        self._marker = b" " if target.strips_leading_space else b""
        self.ids: dict[bytes, int] = {}
        doubled = set()
        for i, part in enumerate(text_tokens(target)):
            if part and self.ids.setdefault(part, i) != i:
                doubled.add(part)
        # Of several ids with the same bytes ("a" and <0x61>) texts hold the one that the tokenizer writes.
        for part, first in zip(doubled, self._first_tokens(list(doubled), at_start=False), strict=True):
            if first != NOWHERE and target.token_bytes[first] == part:
                self.ids[part] = first

    @cached_property
    def strings(self) -> tuple[list[int], list[str]]:
        """Ids in ascending order, and their strings."""
        part_of = sorted((i, part) for part, i in self.ids.items())
        return [i for i, _ in part_of], [string_of(part) for _, part in part_of]

    def exact(self, part: bytes, at_start: bool) -> int:
        """The token with these bytes, or NOWHERE."""
        return self.ids.get(self._marker + part if at_start else part, NOWHERE)

    def canonical(self, parts: Sequence[bytes], at_start: bool) -> list[int]:
        """First token of each one's encoding; for bytes that are no text, the longest they begin with."""
        return [
            self._longest_prefix(part, at_start) if first == NOWHERE else first
            for part, first in zip(parts, self._first_tokens(parts, at_start), strict=True)
        ]

    def _first_tokens(self, parts: Sequence[bytes], at_start: bool) -> list[int]:
        found, texts = [NOWHERE] * len(parts), {}
        for i, part in enumerate(parts):
            with contextlib.suppress(UnicodeDecodeError):
                texts[i] = part.decode()
        for anchor in ("",) if at_start or not self._marker else _ANCHORS:
            asked, texts = texts, {}
            encodings = self._target.encode_each([anchor + text for text in asked.values()])
            for (i, text), tokens in zip(asked.items(), encodings, strict=True):
                if isinstance(tokens, TokenizerError):  # no way to write this text
                    continue
                first = _first_after(anchor, tokens)
                if first is None:
                    texts[i] = text
                else:
                    found[i] = self._text_token(int(tokens.ids[first]))
        return found

    def _text_token(self, token: int) -> int:
        """The id, unless it stands for no bytes (an unknown token, a special spelt out in the text)."""
        usable = token not in self._target.special_ids and self._target.token_bytes[token] is not None
        return token if usable else NOWHERE

    def _longest_prefix(self, part: bytes, at_start: bool) -> int:
        if at_start and self._marker:  # a lone marker comes first, then the bytes
            return self.ids.get(self._marker, NOWHERE)
        found = (self.ids[part[:n]] for n in range(len(part), 0, -1) if part[:n] in self.ids)
        return next(found, NOWHERE)


def _first_after(anchor: str, tokens: Tokens) -> int | None:
    """Which token is the first after the anchor; None if none begins there."""
    first, begin = 0, len(anchor.encode())
    if anchor:
        first = int(tokens.ends.searchsorted(begin, side="right"))
        if first == 0 or tokens.ends[first - 1] != begin:
            return None
    return first if first < len(tokens.ids) else None


class VocabularyMap:
    """Target ids for one teacher's tokens, whole or in part.

    Args:
        projection: `exact` (equal bytes, or nowhere), `mined` (else least edit distance over the whole
            vocabulary, the lowest id on ties) or `prefix` (else the first token of the target's encoding).
    """

    def __init__(
        self, teacher: Vocabulary, target: Vocabulary, projection: Literal["exact", "mined", "prefix"]
    ) -> None:
        self.bytes = ByteTable.of(teacher)
        self._index = TargetIndex(target)
        self._rule: Callable[[list[bytes], bool], list[int]] = {
            "exact": self._nowhere,
            "mined": self._mined,
            "prefix": self._index.canonical,
        }[projection]
        self._memo: dict[tuple[bytes, bool], int] = {}
        self.suffix = np.full(len(self.bytes.flat), UNRESOLVED, np.int32)
        if same_tokens(teacher, target):
            self.whole = np.arange(teacher.vocab_size, dtype=np.int32)
            self.whole[target.vocab_size :] = NOWHERE
            self.at_start = self.whole
            self.is_exact = self.whole != NOWHERE
            return
        parts = text_tokens(teacher)
        self.whole = np.array(self._look_up(parts, at_start=False), np.int32)
        for role in ("bos_id", "eos_id"):
            if (i := getattr(teacher, role)) is not None and (j := getattr(target, role)) is not None:
                self.whole[i] = j
        landed = [b"" if i == NOWHERE else target.token_bytes[int(i)] for i in self.whole]
        same = [not part or part == there for part, there in zip(parts, landed, strict=True)]
        self.is_exact = np.array(same) & (self.whole != NOWHERE)
        self.at_start = self.whole
        if teacher.strips_leading_space or target.strips_leading_space:
            self.at_start = np.where([bool(part) for part in parts], UNRESOLVED, self.whole).astype(np.int32)

    def resolve(self, missing: NDArray[np.int64]) -> None:
        """Fill table entries that a kernel missed: offsets into `suffix`, or ~id for `at_start`.

        Entries never change once filled, so threads may resolve at the same time.
        """
        missing = np.unique(missing)
        ids = ~missing[missing < 0]
        first, last = self.bytes.start[ids] + self.bytes.lead[ids], self.bytes.start[ids + 1]
        self.at_start[ids] = self._look_up(self._slices(first, last), at_start=True)
        offsets = missing[missing >= 0]
        ends = self.bytes.start[np.searchsorted(self.bytes.start, offsets, side="right")]
        self.suffix[offsets] = self._look_up(self._slices(offsets, ends), at_start=False)

    def _slices(self, first: NDArray[np.integer], last: NDArray[np.integer]) -> list[bytes]:
        return [self.bytes.flat[a:b].tobytes() for a, b in zip(first, last, strict=True)]

    def _look_up(self, parts: list[bytes], at_start: bool) -> list[int]:
        found = {part: self._index.exact(part, at_start) for part in parts}
        inexact = [part for part, i in found.items() if part and i == NOWHERE]
        new = [part for part in inexact if (part, at_start) not in self._memo]
        for part, i in zip(new, self._rule(new, at_start), strict=True):
            self._memo[part, at_start] = i
        found |= {part: self._memo[part, at_start] for part in inexact}
        return [found[part] for part in parts]

    def _nowhere(self, parts: list[bytes], at_start: bool) -> list[int]:
        return [NOWHERE] * len(parts)

    def _mined(self, parts: list[bytes], at_start: bool) -> list[int]:
        # An id whose bytes texts spell with another one (<0x61> beside "a") is nobody's nearest.
        ids, strings = self._index.strings
        if not ids:
            return self._nowhere(parts, at_start)
        queries = [string_of(part) for part in parts]
        return [ids[i] for i in nearest(Strings.of(queries + strings), len(queries))]

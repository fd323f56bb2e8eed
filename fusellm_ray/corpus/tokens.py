"""A byte view of any fast tokenizer: which bytes of a text does each token cover, which bytes does it spell.

Enters: a tokenizer's folder or hub id, then texts. Leaves: ids with byte end offsets, and the vocabulary as
bytes. Used for the target (rows, export) and for each teacher (alignment); offsets are what aligns them.

Ends come from the first of these that accounts for every byte of the text:

    1. the tokens' own bytes, added up (nearly always)
    2. the same, less bytes that the vocabulary lacks (SmolLM2 has no token for some control characters)
    3. the tokenizer's character offsets: a normaliser has changed the text (NFC, lowercasing)
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusellm_ray.compiled import compiled, frozen
from fusellm_ray.config import ModelConfig, ReaderConfig
from fusellm_ray.corpus.spelling import is_byte_level, prepended_token, special_tokens, speller, text_only
from fusellm_ray.errors import TokenizerError

_SHOWN = 24
_NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Encoding:
    """Tokens of one text. `ends[i]` is the byte offset where token i ends; the last is the text's length."""

    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]


class ByteTokenizer:
    """A fast tokenizer with byte offsets and its vocabulary as bytes.

    Plain text is never encoded as a control token: the string "</s>" in a document is spelled out. Added
    tokens that are not special (runs of spaces, <think>) are ordinary text and stay whole.
    """

    vocab_size: int
    bos_id: int | None
    """Set only where the tokenizer itself prepends it, or where it was told to."""
    eos_id: int | None
    special_ids: frozenset[int]
    token_bytes: Sequence[bytes | None]
    """[vocab_size]; None for special tokens, and for ids that the model has and the tokenizer has not."""
    strips_leading_space: bool
    """A text's first token carries a space that is not in the text (SentencePiece's dummy prefix)."""
    fingerprint: str
    hf: PreTrainedTokenizerFast

    def __init__(
        self,
        hf: PreTrainedTokenizerBase,
        name: str,
        vocab_size: int | None = None,
        add_bos: bool | None = None,
    ) -> None:
        """Wrap a loaded tokenizer; `name` is for errors. See `load`."""
        if not isinstance(hf, PreTrainedTokenizerFast):
            raise TokenizerError(
                f"{name}: {type(hf).__name__} is not a fast tokenizer and gives no offsets; "
                "save a tokenizer.json with the model"
            )
        self.hf = hf
        self.name = name
        tree: dict[str, Any] = json.loads(hf.backend_tokenizer.to_str())
        tree.update(truncation=None, padding=None)
        vocabulary = hf.backend_tokenizer.get_vocab(with_added_tokens=True)

        self.bos_id = prepended_token(hf, name) if add_bos is None else hf.bos_token_id if add_bos else None
        if add_bos and self.bos_id is None:
            raise TokenizerError(f"{name}: add_bos is set, and the tokenizer has no BOS; leave it out")
        self.eos_id = hf.eos_token_id
        special = special_tokens(hf, tree, vocabulary)
        self.special_ids = frozenset(special.values())
        self.vocab_size = _vocab_size(name, vocabulary, special, vocab_size, (self.bos_id, self.eos_id))
        self.fingerprint = hashlib.sha256(
            json.dumps([tree, self.vocab_size, self.bos_id, self.eos_id], sort_keys=True).encode()
        ).hexdigest()

        spell = speller(name, tree)
        # Added tokens are matched before text is written in the byte-level alphabet.
        raw_ids = {token["id"] for token in tree["added_tokens"]} if is_byte_level(tree) else set()
        token_bytes: list[bytes | None] = [None] * self.vocab_size
        for token, token_id in vocabulary.items():
            if token_id not in self.special_ids and token_id < self.vocab_size:
                token_bytes[token_id] = token.encode() if token_id in raw_ids else spell(token)
        self.token_bytes = token_bytes
        # \xff occurs in no UTF-8 text, so a control token never passes for text.
        self._spelling = [b"\xff" if spelled is None else spelled for spelled in token_bytes]
        lengths = np.fromiter(map(len, self._spelling), np.int64, self.vocab_size)
        self._letters = frozen(np.frombuffer(b"".join(self._spelling), np.uint8), np.uint8)
        self._starts = frozen(np.append(0, np.cumsum(lengths)), np.int64)
        self._has_bytes = np.fromiter((b is not None for b in token_bytes), np.bool_, self.vocab_size)

        spelled_bytes = {spelled[0] for spelled in token_bytes if spelled and len(spelled) == 1}
        self._missing = bytes(set(range(256)) - spelled_bytes) if is_byte_level(tree) else b""

        self._rust = text_only(tree, special)
        probe = self._rust.encode("a", add_special_tokens=False).ids
        self.strips_leading_space = b"".join(self._spelling[i] for i in probe) == b" a"

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        vocab_size: int | None = None,
        add_bos: bool | None = None,
    ) -> ByteTokenizer:
        """Load the tokenizer of a model.

        Args:
            model: a folder, or a hub id.
            vocab_size: the model's number of embeddings, which may exceed the tokenizer's; default: the
                tokenizer's highest id + 1.
            add_bos: whether each text begins with BOS; default: where the tokenizer itself prepends it.

        Raises:
            TokenizerError: there is no tokenizer, it is not fast, it cannot say what its tokens spell, or it has
                no BOS to add.
        """
        if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
            raise TokenizerError(f"{model}: no such folder; expected one with tokenizer.json, or a hub id")
        try:
            hf = transformers.AutoTokenizer.from_pretrained(
                str(Path(model).expanduser()) if model.startswith("~") else model,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        except Exception as error:  # whatever a broken folder makes transformers raise
            raise TokenizerError(
                f"{model}: no tokenizer could be loaded ({type(error).__name__}: {error}); "
                "expected a folder with tokenizer.json, or a hub id that can be reached"
            ) from error
        return cls(hf, model, vocab_size, add_bos)

    @classmethod
    def of_model(cls, model: ModelConfig, vocab_size: int | None = None) -> ByteTokenizer:
        """The tokenizer of a configured model; see `load`."""
        return cls.load(
            model.model,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            vocab_size=vocab_size,
            add_bos=model.add_bos if isinstance(model, ReaderConfig) else None,
        )

    def encode(self, text: str) -> Encoding:
        """Encode one text, without BOS or EOS.

        Raises:
            TokenizerError: an unknown token swallows part of the text, or no token covers part of it.
        """
        (outcome,) = self.encode_each([text])
        if isinstance(outcome, TokenizerError):
            raise outcome
        return outcome

    def encode_each(self, texts: Sequence[str]) -> list[Encoding | TokenizerError]:
        """Encode several texts, in parallel where the process has more than one core.

        Returns:
            For each its encoding, or the error that `encode` raises for it.

        Raises:
            TokenizerError: a text has no UTF-8 bytes.
        """
        data = [self._utf8(text) for text in texts]
        encoded = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(each.ids, np.int32) for each in encoded]
        every, num_ids = np.concatenate([_NO_IDS, *ids]), np.fromiter(map(len, ids), np.int64, len(ids))
        ends, is_spelt = np.empty(len(every), np.int32), np.empty(len(ids), np.bool_)
        _add_up(
            every,
            num_ids,
            np.frombuffer(b"".join(data), np.uint8),
            np.fromiter(map(len, data), np.int64, len(data)),
            self._letters,
            self._starts,
            self.strips_leading_space,
            ends,
            is_spelt,
        )
        outcomes: list[Encoding | TokenizerError] = []
        last = 0
        for i, text in enumerate(texts):
            first, last = last, last + len(ids[i])
            if not text:
                outcomes.append(Encoding(_NO_IDS, _NO_IDS))
            elif is_spelt[i]:
                outcomes.append(Encoding(every[first:last], ends[first:last]))
            else:
                try:
                    outcomes.append(self._changed(text, data[i], ids[i]))
                except TokenizerError as error:
                    outcomes.append(error)
        return outcomes

    def sequence(self, text: str, ends_document: bool) -> Encoding:
        """What a model reads of `text`: BOS (end 0) if the tokenizer prepends it, the tokens, and EOS (zero
        width) if the text ends its document and the tokenizer has one."""
        return self.framed(self.encode(text), ends_document)

    def framed(self, encoding: Encoding, ends_document: bool) -> Encoding:
        """`sequence` of a text that is already encoded."""
        ids, ends = [encoding.ids], [encoding.ends]
        if self.bos_id is not None:
            ids.insert(0, np.array([self.bos_id], np.int32))
            ends.insert(0, np.zeros(1, np.int32))
        if ends_document and self.eos_id is not None:
            ids.append(np.array([self.eos_id], np.int32))
            ends.append(encoding.ends[-1:] if len(encoding.ends) else np.zeros(1, np.int32))
        return Encoding(np.concatenate(ids), np.concatenate(ends))

    def _changed(self, text: str, data: bytes, ids: npt.NDArray[np.int32]) -> Encoding:
        """Of a text that its tokens do not spell out."""
        if self._missing and len(ids):
            spelled = b"".join(map(self._spelling.__getitem__, ids.tolist()))
            if spelled == data.translate(None, self._missing):
                return self._without_missing(ids, text, data)
        return self._from_offsets(text, data)

    def _utf8(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"{self.name}: character {error.start} of the text is an unpaired surrogate "
                f"({text[error.start]!r}); remove it, it has no UTF-8 bytes"
            ) from None

    def _without_missing(self, ids: npt.NDArray[np.int32], text: str, data: bytes) -> Encoding:
        """Ends of a text with bytes that the vocabulary lacks: they go with the token after them."""
        is_missing = np.zeros(256, np.bool_)
        is_missing[list(self._missing)] = True
        dropped = is_missing[np.frombuffer(data, np.uint8)]
        chars = np.searchsorted(_byte_offsets(text), np.flatnonzero(dropped), side="right") - 1
        for i in chars.tolist():
            if _is_text(text[i]):
                raise self._uncovered(text[i], int(_byte_offsets(text)[i]))
        ends = np.flatnonzero(~dropped)[np.cumsum(self._starts[ids + 1] - self._starts[ids]) - 1] + 1
        ends[-1] = len(data)
        return Encoding(ids, ends.astype(np.int32))

    def _uncovered(self, text: str, start: int) -> TokenizerError:
        return TokenizerError(
            f"{self.name}: no token covers the text {_shown(text)} at byte {start}; the tokenizer drops it: "
            "use another tokenizer, or take such characters out of the corpus"
        )

    def _from_offsets(self, text: str, data: bytes) -> Encoding:
        """Ends by the tokenizer's own character offsets: its normaliser has changed the text."""
        encoding = self._rust.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        byte_of = _byte_offsets(text)

        swallowed = np.flatnonzero(~self._has_bytes[ids])
        if len(swallowed):
            i = int(swallowed[0])
            raise TokenizerError(
                f"{self.name}: token {encoding.tokens[i]!r} (id {ids[i]}) swallows the text "
                f"{_shown(text[spans[i, 0] : spans[i, 1]])} at byte {byte_of[spans[i, 0]]}; "
                "use a tokenizer with byte fallback, or take such characters out of the corpus"
            )
        reached = np.concatenate([[0], np.maximum.accumulate(spans[:, 1])])
        following = np.append(spans[:, 0], len(text))
        for i in np.flatnonzero(following > reached).tolist():
            gap = text[reached[i] : following[i]]
            if i > 0 and _is_composed(text[reached[i] - 1], gap):
                spans[i - 1, 1] = following[i]
            elif not len(ids) or any(_is_text(char) for char in gap):
                raise self._uncovered(gap, int(byte_of[reached[i]]))
        starts, stops = byte_of[spans[:, 0]], byte_of[spans[:, 1]]
        # Characters that are no text and that the tokenizer drops go with the token after them.
        ends = np.maximum.accumulate(np.minimum(stops, np.append(starts[1:], len(data))))
        ends[-1] = len(data)
        for first, last in _overlapping(starts, stops):
            # Tokens that share a character: exact where they spell it, else the last of them covers it.
            spelled = [self._spelling[i] for i in ids[first : last + 1]]
            shared = data[starts[first] : stops[last]]
            if first == 0 and b"".join(spelled) == b" " + shared:
                spelled[0] = spelled[0][1:]
            if b"".join(spelled) == shared:
                ends[first : last + 1] = starts[first] + np.cumsum([len(s) for s in spelled])
        return Encoding(ids, ends.astype(np.int32))


@compiled
def _add_up(ids, num_ids, data, num_bytes, letters, starts, strips_leading_space, ends, is_spelt):
    """Fill `ends` of the texts that their tokens spell out, and which these are.

    Args:
        ids, data: of all texts, end to end; `num_ids` and `num_bytes` of each.
        letters, starts: token i spells letters[starts[i]:starts[i + 1]].
    """
    first = origin = 0
    for text in range(len(num_ids)):
        last, size, is_same = first + num_ids[text], 0, True
        for i in range(first, last):
            is_same &= ids[i] < len(starts) - 1
            size += starts[ids[i] + 1] - starts[ids[i]] if is_same else 0
        # The space before the first token is not in the text.
        at = -1 if strips_leading_space and size == num_bytes[text] + 1 else 0
        is_same &= size + at == num_bytes[text]
        for i in range(first, last):
            if not is_same:
                break
            for j in range(starts[ids[i]], starts[ids[i] + 1]):
                is_same &= letters[j] == (data[origin + at] if at >= 0 else 0x20)
                at += 1
            ends[i] = at
        is_spelt[text] = is_same
        first, origin = last, origin + num_bytes[text]


def _vocab_size(
    name: str,
    vocabulary: dict[str, int],
    special: dict[str, int],
    wanted: int | None,
    roles: tuple[int | None, ...],
) -> int:
    highest = max(vocabulary.values()) + 1
    if wanted is None:
        return highest
    # A control token without an embedding (a padding token added later) never occurs in text.
    used = [i for token, i in vocabulary.items() if token not in special]
    needed = max(used + [role for role in roles if role is not None])
    if needed >= wanted:
        raise TokenizerError(
            f"{name}: the tokenizer has token id {needed}, the model only {wanted} embeddings; "
            "take the tokenizer that belongs to the model, or resize the model's embeddings"
        )
    return wanted


def _overlapping(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs (first, last) of tokens in which each begins before its predecessor's end."""
    shares = np.flatnonzero(starts[1:] < stops[:-1])
    for run in np.split(shares, np.flatnonzero(np.diff(shares) > 1) + 1):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1


def _byte_offsets(text: str) -> npt.NDArray[np.int64]:
    """[characters + 1]: the byte at which each character begins."""
    codepoints = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codepoints >= 0x80) + (codepoints >= 0x800) + (codepoints >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _is_composed(before: str, gap: str) -> bool:
    """Does a normaliser make one character of these: é of e and an accent, a syllable of Hangul letters?"""
    is_mark = all(unicodedata.category(char).startswith("M") for char in gap)
    return is_mark or len(unicodedata.normalize("NFKC", before + gap)) == 1


def _is_text(char: str) -> bool:
    """Neither white space nor a control, private or unassigned code point."""
    return not char.isspace() and not unicodedata.category(char).startswith("C")


def _shown(text: str) -> str:
    return repr(text[:_SHOWN]) + ("…" if len(text) > _SHOWN else "")

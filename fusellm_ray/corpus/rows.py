"""Documents → rows of target tokens.

A row is filled with segments: whole documents, and pieces of those that do not fit. A document is cut on a
token boundary that is also a character boundary, and goes on in the next row as a segment of its own:

    row 0  [BOS a a a a EOS][BOS b b b EOS][BOS c c c c c c c]
    row 1  [BOS c c c EOS][BOS d d d d d EOS] padding

The bytes of a document's segments, put together, are the document. Read by trainer ranks; teachers get the
segments' bytes and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusellm_ray.corpus.tokens import ByteTokenizer, Encoding
from fusellm_ray.errors import CorpusError, TokenizerError

if TYPE_CHECKING:  # teachers know segments, and do without `datasets`, a second of their start
    from fusellm_ray.corpus.source import Corpus, Document

IGNORE_INDEX = -100

_BLOCK_CHARS = 1 << 18
"""Characters tokenised at once: larger documents go in blocks, so that memory and a resume stay cheap."""
_HEAD_TOKENS = 64
"""A piece's first word ends at this many tokens, if at no white space before."""
_SEARCHED_TOKENS = 16
"""A piece may end this many tokens before its row does, to end with a character."""
_SMALLEST_PIECE = 1 / 64
"""Share of a row: no piece shorter than this is cut from a document to fill a row up."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A document or a piece of it, as text and as target tokens (T of them, BOS and EOS included)."""

    text: bytes
    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    """[T] byte offset in `text` where each token ends."""
    ends_document: bool
    domain: str
    document: str

    @property
    def num_positions(self) -> int:
        return len(self.ids) - 1


@dataclass(frozen=True, slots=True)
class Row:
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class RowArrays:
    """A row as the model reads it; L = row_tokens."""

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    """[L] from 0 in each segment, and in the padding."""
    labels: npt.NDArray[np.int64]
    """[L] the next token; IGNORE_INDEX at a segment's last token and in the padding."""
    gold_bytes: npt.NDArray[np.int32]
    """[L] bytes that the label covers; 0 where there is none, and for EOS."""
    segment: npt.NDArray[np.int32]
    """[L] index into the row's segments; -1 in the padding."""


def row_arrays(row: Row, row_tokens: int, pad_id: int) -> RowArrays:
    """Lay a row's segments out one after another, padded to `row_tokens`."""
    lengths = [len(segment.ids) for segment in row.segments]
    used = sum(lengths)
    assert used <= row_tokens, f"row of {used} tokens, limit {row_tokens}"
    input_ids = np.full(row_tokens, pad_id, np.int64)
    labels = np.full(row_tokens, IGNORE_INDEX, np.int64)
    gold_bytes = np.zeros(row_tokens, np.int32)
    begin = 0
    for segment, length in zip(row.segments, lengths, strict=True):
        stop = begin + length
        input_ids[begin:stop] = segment.ids
        labels[begin : stop - 1] = segment.ids[1:]
        gold_bytes[begin : stop - 1] = np.diff(segment.ends)
        begin = stop
    runs = [*lengths, row_tokens - used]
    position_ids = np.concatenate([np.arange(run, dtype=np.int64) for run in runs])
    segment_of = np.repeat(np.array([*range(len(lengths)), -1], np.int32), runs)
    return RowArrays(input_ids, position_ids, labels, gold_bytes, segment_of)


class ShardReader:
    """One shard of the corpus as rows, for ever.

    Rows depend on the corpus, the tokenizer, the shard and `row_tokens`, not on when or where they are read.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: ByteTokenizer,
        shard: int,
        num_shards: int,
        row_tokens: int,
        cursor: Mapping[str, Any] | None = None,
    ) -> None:
        """Read from the shard's start, or from where another reader's `cursor()` was taken."""
        self._tokenizer = tokenizer
        self._row_tokens = row_tokens
        self._smallest_piece = max(2, int(row_tokens * _SMALLEST_PIECE))
        self._documents = corpus.documents(shard, num_shards, cursor and cursor["documents"])
        self._before = self._documents.cursor()
        self._rest: _Rest | None = None
        if cursor and (cursor["block"] or cursor["offset"]):
            self._rest = _Rest(next(self._documents), tokenizer, cursor["block"], cursor["offset"])

    def next_row(self) -> Row:
        """The next row.

        Raises:
            TokenizerError: the tokenizer cannot account for part of a document.
            CorpusError: one character takes more tokens than a row has.
        """
        segments: list[Segment] = []
        room = self._row_tokens
        while room >= 2:
            if self._rest is None:
                self._before = self._documents.cursor()
                self._rest = _Rest(next(self._documents), self._tokenizer)
            segment = self._rest.take(room, self._smallest_piece)
            if segment is None:
                break
            segments.append(segment)
            room -= len(segment.ids)
            if segment.ends_document:
                self._rest = None
        if not segments:
            assert self._rest is not None
            raise CorpusError(
                f"document {self._rest.document.name}: one character takes more tokens than a row of "
                f"{self._row_tokens}; raise corpus.row_tokens"
            )
        return Row(tuple(segments))

    def cursor(self) -> dict[str, Any]:
        """Small and JSON-able; a reader made from it continues with exactly the next row."""
        if self._rest is None:
            return {"documents": self._documents.cursor(), "block": 0, "offset": 0}
        return {"documents": self._before, "block": self._rest.block, "offset": self._rest.offset}

    @property
    def epochs(self) -> dict[str, int]:
        """Complete passes through this shard of each source."""
        return self._documents.epochs


class _Rest:
    """What is left of a document: from byte `offset` of block number `block` on.

    What it gives is a function of the document and the place, not of how one got there; so a place is all
    that a cursor must hold.
    """

    def __init__(self, document: Document, tokenizer: ByteTokenizer, block: int = 0, offset: int = 0) -> None:
        self.document = document
        self._tokenizer = tokenizer
        self._open(block, offset)

    def _open(self, block: int, offset: int) -> None:
        start = block * _BLOCK_CHARS
        self.block = block
        text = self.document.text[start : start + _BLOCK_CHARS]
        self._is_last_block = start + _BLOCK_CHARS >= len(self.document.text)
        self._data = text.encode()
        is_inside = offset < len(self._data) and self._data[offset] & 0xC0 != 0x80
        if not is_inside and (block or offset):
            raise CorpusError(
                f"document {self.document.name}: no character begins at byte {offset} of its part {block}, where the "
                "checkpoint was; it was changed since: restore it, or use another run.name"
            )
        self._encoding = self._encode(text)
        self._seek(offset)

    def _encode(self, text: str) -> Encoding:
        try:
            return self._tokenizer.encode(text)
        except TokenizerError as error:
            place = f", from character {self.block * _BLOCK_CHARS} on" if self.block else ""
            raise TokenizerError(f"document {self.document.name}{place}: {error}") from error

    def _seek(self, offset: int) -> None:
        """Go to a place inside the block.

        A piece is a text of its own, so its first word is encoded anew, as the start of a text (SentencePiece
        then prepends its space); after that, the block's tokens serve.
        """
        self.offset = offset
        self._head, self._next = _NOTHING, 0
        if offset:
            ends = self._encoding.ends
            first = last = int(np.searchsorted(ends, offset, side="right"))
            for last in range(first, len(ends)):
                if self._is_cut(ends, last) and (
                    last - first >= _HEAD_TOKENS or self._starts_word(ends[last])
                ):
                    break
            self._head = self._encode(self._data[offset : ends[last]].decode())
            self._next = last + 1

    def take(self, room: int, smallest_piece: int) -> Segment | None:
        """The next segment, of at most `room` tokens; None where none fits."""
        tokenizer = self._tokenizer
        num_bos = tokenizer.bos_id is not None
        num_eos = self._is_last_block and tokenizer.eos_id is not None
        num_left = len(self._head.ids) + len(self._encoding.ids) - self._next
        if num_bos + num_left + num_eos <= room:
            segment = self._segment(self._tokens(num_left), self._is_last_block)
            if not self._is_last_block:
                self._open(self.block + 1, 0)
            return segment
        if room < smallest_piece:
            return None
        # Something must remain, and be of use: a lone token predicts nothing without BOS or EOS beside it.
        remain = 1 if num_bos or num_eos else 2
        piece = self._cut(min(room - num_bos, num_left - remain))
        if piece is None or num_bos + len(piece.ids) < 2:
            return None
        segment = self._segment(piece, ends_document=False)
        self._seek(self.offset + int(piece.ends[-1]))
        return segment

    def _cut(self, limit: int) -> Encoding | None:
        """At most `limit` tokens that end with a character, short of the block's end."""
        tokens = self._tokens(limit)
        for count in range(len(tokens.ids), max(len(tokens.ids) - _SEARCHED_TOKENS, 0), -1):
            if self._is_cut(tokens.ends, count - 1, self.offset):
                return Encoding(tokens.ids[:count], tokens.ends[:count])
        # A run of tokens across characters, as of one emoji many times: encode what fits as a text of its own.
        stop = self.offset + int(tokens.ends[-1]) if len(tokens.ends) else 0
        while stop > self.offset:
            if self._data[stop] & 0xC0 != 0x80:
                piece = self._encode(self._data[self.offset : stop].decode())
                if len(piece.ids) <= limit:
                    return piece
            stop -= 1
        return None

    def _tokens(self, count: int) -> Encoding:
        """The next `count` tokens, with ends from the present place."""
        head, block = self._head, self._encoding
        after = slice(self._next, self._next + max(count - len(head.ids), 0))
        return Encoding(
            np.concatenate([head.ids[:count], block.ids[after]]),
            np.concatenate([head.ends[:count], block.ends[after] - np.int32(self.offset)]),
        )

    def _segment(self, tokens: Encoding, ends_document: bool) -> Segment:
        framed = self._tokenizer.framed(tokens, ends_document)
        text = self._data[self.offset : self.offset + int(tokens.ends[-1])]
        return Segment(text, framed.ids, framed.ends, ends_document, self.document.domain, self.document.name)

    def _is_cut(self, ends: npt.NDArray[np.int32], token: int, base: int = 0) -> bool:
        """Does this token cover bytes, and end with a character that is not the block's last? (A character that
        a normaliser expands has tokens without width before the one that covers it.)"""
        begin = ends[token - 1] if token else 0
        at = base + int(ends[token])
        return bool(ends[token] > begin and at < len(self._data) and self._data[at] & 0xC0 != 0x80)

    def _starts_word(self, at: int) -> bool:
        return self._data[at : at + 1].isspace() and not self._data[at - 1 : at].isspace()


_NOTHING = Encoding(np.zeros(0, np.int32), np.zeros(0, np.int32))

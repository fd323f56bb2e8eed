"""The wire between a trainer's rank and a teacher's replica: one contiguous buffer of bytes each way.

    rank     segments → `encode_request` ─ uint8 ─→ `decode_request` → segments           replica
    rank     `Aligned` ← `decode_frame` ←─ uint8 ─ `encode_frame` ← `Aligned`             replica

    buffer   prefix (magic, version, kind, lengths) │ msgpack header │ arrays, each at a multiple of 8 bytes

The header lists every array with dtype and shape, so a buffer describes itself; a reader holds each entry
against what it asked for and refuses the first that differs with a `FrameError` that names it. Nothing is
ever unpickled. An answer costs 4k + 4.1 bytes a position where ids fit uint16, 6k + 4.1 elsewhere.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import msgpack
import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.errors import FrameError
from fusellm_ray.stream import float16

VERSION = 1
MASS_TOLERANCE = 0.01
"""How far from one a position's probabilities may add up; rounding to float16 moves their sum by 0.002."""

_MAGIC = b"FLRF"
_REQUEST, _ANSWER = 1, 2
_KINDS = {_REQUEST: "request", _ANSWER: "answer"}
_PREFIX = struct.Struct("<4sHHIIQ")  # magic, version, kind, header bytes, zero, total bytes
_ALIGNMENT = 8

Buffer = NDArray[np.uint8]
Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


# ---------------------------------------------------------------------------------------- answers


def in_wire_form(part: Aligned, vocab_size: int) -> Aligned:
    """`part` with the dtypes that a frame has, in arrays of its own: half the memory, and encoded as the same bytes."""
    return replace(
        part,
        ids=part.ids.astype(_id_dtype(vocab_size)),
        logprobs=float16.rounded(part.logprobs),
        gold=float16.rounded(part.gold),
        residual=float16.rounded(part.residual),
    )


def encode_frame(parts: Sequence[Aligned], *, teacher: str, fingerprint: str, vocab_size: int) -> Buffer:
    """One teacher's aligned distributions for the segments of one request, in their order.

    Args:
        parts: one `Aligned` a segment, all with the same number of candidates.
        teacher: the teacher's name.
        fingerprint: what the answer depends on besides the text; the reader compares it.
        vocab_size: of the target; decides the width of the ids.
    """
    widths = {part.ids.shape[1] for part in parts}
    assert len(widths) <= 1, f"segments of one frame differ in their number of candidates: {widths}"
    num_positions = [len(part.gold) for part in parts]
    top_k = widths.pop() if widths else 0
    total = sum(num_positions)
    header = {
        "teacher": teacher,
        "fingerprint": fingerprint,
        "vocab_size": vocab_size,
        "segments": len(parts),
        "positions": total,
        "top_k": top_k,
    }
    buffer, arrays = _allocate(_ANSWER, header, _answer_layout(len(parts), total, top_k, vocab_size))
    arrays["num_positions"][:] = num_positions
    arrays["teacher_nats"][:] = [part.teacher_nats for part in parts]
    arrays["teacher_tokens"][:] = [part.teacher_tokens for part in parts]
    arrays["teacher_bytes"][:] = [part.teacher_bytes for part in parts]
    if parts:
        with np.errstate(over="ignore"):  # below -65504 nats is -inf in float16, as it should be
            for name in ("ids", "logprobs", "gold", "residual"):
                np.concatenate([getattr(part, name) for part in parts], out=arrays[name], casting="unsafe")
        arrays["valid"][:] = np.packbits(np.concatenate([part.valid for part in parts]))
    return buffer


def answer_bytes(num_positions: int, top_k: int, vocab_size: int) -> int:
    """Size of an answer's arrays, a little less than that of its frame."""
    return _place(_answer_layout(0, num_positions, top_k, vocab_size), 0)[1]


def decode_frame(
    buffer: Any,
    *,
    teacher: str,
    fingerprint: str,
    vocab_size: int,
    top_k: int,
    num_positions: Sequence[int],
) -> list[Aligned]:
    """Read and check an answer.

    Rounding to float16 is divided out again: at valid positions the probabilities sum to one in float32.

    Args:
        buffer: what arrived.
        teacher: the teacher that was asked.
        fingerprint: its fingerprint when it was first seen.
        vocab_size: of the target.
        top_k: candidates a position.
        num_positions: of each segment that was asked for.

    Returns:
        One `Aligned` a segment: views into arrays of the whole batch.

    Raises:
        FrameError: the buffer is not the answer that was asked for; the message names the field.
    """
    header, start, raw = _open(buffer, _ANSWER)
    _expect(header, "teacher", teacher)
    _expect(header, "fingerprint", fingerprint)
    _expect(header, "vocab_size", vocab_size)
    _expect(header, "segments", len(num_positions))
    total = int(sum(num_positions))
    _expect(header, "positions", total)
    top_k = top_k if num_positions else 0  # without segments there are no candidates
    _expect(header, "top_k", top_k)
    arrays = _arrays(header, start, raw, _answer_layout(len(num_positions), total, top_k, vocab_size))

    if not np.array_equal(arrays["num_positions"], num_positions):
        at = int(np.argmax(arrays["num_positions"] != np.asarray(num_positions)))
        _refuse(
            "num_positions",
            f"segment {at} has {arrays['num_positions'][at]} positions, asked {num_positions[at]}",
        )
    ids = arrays["ids"].astype(np.int32)
    if ids.size and int(ids.view(np.uint32).max()) >= vocab_size:
        at = int(np.argmax(ids.view(np.uint32).max(axis=1) >= vocab_size))
        _refuse(
            "ids", f"position {at} holds an id outside the vocabulary of {vocab_size}: {ids[at].tolist()}"
        )
    valid = np.unpackbits(arrays["valid"], count=total).view(bool)
    nats = arrays["teacher_nats"]
    if not (np.isfinite(nats).all() and (nats >= 0).all()):
        _refuse("teacher_nats", f"{nats.tolist()} are not all finite and at least 0")
    logprobs, gold, residual = _normalised(arrays, valid)

    bounds = np.concatenate([[0], np.cumsum(num_positions, dtype=np.int64)]).tolist()
    tokens, num_bytes = arrays["teacher_tokens"].tolist(), arrays["teacher_bytes"].tolist()
    return [
        Aligned(
            ids=ids[start:stop],
            logprobs=logprobs[start:stop],
            gold=gold[start:stop],
            residual=residual[start:stop],
            valid=valid[start:stop],
            teacher_nats=float(nats[s]),
            teacher_tokens=tokens[s],
            teacher_bytes=num_bytes[s],
        )
        for s, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


def _answer_layout(segments: int, positions: int, top_k: int, vocab_size: int) -> Layout:
    return _layout(
        num_positions=("<u4", (segments,)),
        teacher_nats=("<f8", (segments,)),
        teacher_tokens=("<u4", (segments,)),
        teacher_bytes=("<u4", (segments,)),
        ids=(_id_dtype(vocab_size), (positions, top_k)),
        logprobs=("<f2", (positions, top_k)),
        gold=("<f2", (positions,)),
        residual=("<f2", (positions,)),
        valid=("|u1", (-(-positions // 8),)),
    )


def _id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<i4"


def _normalised(
    arrays: Mapping[str, NDArray[Any]], valid: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], ...]:
    """logprobs [N,k], gold [N], residual [N] in float32, checked, and summing to one where valid."""
    halves = arrays["logprobs"], arrays["gold"], arrays["residual"]
    *normalised, at = float16.normalised(*halves, valid, MASS_TOLERANCE)
    if at < 0:
        return tuple(normalised)
    rows = [array[at].astype(np.float32) for array in halves]
    for name, row in zip(("logprobs", "gold", "residual"), rows, strict=True):
        if np.isnan(row).any() or (row > MASS_TOLERANCE).any():
            _refuse(name, f"position {at} holds {row.tolist()}, which are no logprobs")
    mass = sum(float(np.exp(row).sum()) for row in rows)
    _refuse(
        "logprobs",
        f"the probabilities of position {at} add up to {mass:.4f}, not to 1 within {MASS_TOLERANCE}",
    )


# ---------------------------------------------------------------------------------------- requests


def encode_request(segments: Sequence[Segment]) -> Buffer:
    """The bytes and the target's tokens of the segments to score."""
    tokens, num_bytes = sum(len(s.ids) for s in segments), sum(len(s.text) for s in segments)
    header = {
        "segments": len(segments),
        "tokens": tokens,
        "bytes": num_bytes,
        "domains": [s.domain for s in segments],
        "documents": [s.document for s in segments],
    }
    buffer, arrays = _allocate(_REQUEST, header, _request_layout(len(segments), tokens, num_bytes))
    arrays["text_lengths"][:] = [len(s.text) for s in segments]
    arrays["num_tokens"][:] = [len(s.ids) for s in segments]
    arrays["ends_document"][:] = np.packbits(np.array([s.ends_document for s in segments], dtype=bool))
    arrays["text"][:] = np.frombuffer(b"".join(s.text for s in segments), dtype=np.uint8)
    if segments:
        np.concatenate([s.ids for s in segments], out=arrays["ids"], casting="unsafe")
        np.concatenate([s.ends for s in segments], out=arrays["ends"], casting="unsafe")
    return buffer


def decode_request(buffer: Any, *, vocab_size: int) -> list[Segment]:
    """Read and check a request.

    Args:
        buffer: what arrived.
        vocab_size: of the target.

    Raises:
        FrameError: naming the field that is wrong.
    """
    header, start, raw = _open(buffer, _REQUEST)
    num_segments, num_tokens, num_bytes = (_length(header, name) for name in ("segments", "tokens", "bytes"))
    arrays = _arrays(header, start, raw, _request_layout(num_segments, num_tokens, num_bytes))
    names: dict[str, list[str]] = {}
    for field in ("domains", "documents"):
        value = header.get(field)
        if (
            type(value) is not list
            or len(value) != num_segments
            or not all(type(item) is str for item in value)
        ):
            _refuse(field, f"expected {num_segments} strings")
        names[field] = value

    text_bounds = _bounds(arrays["text_lengths"], len(arrays["text"]), "text_lengths")
    token_bounds = _bounds(arrays["num_tokens"], len(arrays["ids"]), "num_tokens")
    ids, ends = arrays["ids"], arrays["ends"]
    if ids.size and int(ids.view(np.uint32).max()) >= vocab_size:
        at = int(np.argmax(ids.view(np.uint32) >= vocab_size))
        _refuse("ids", f"token {at} is {ids[at]}, outside the vocabulary of {vocab_size}")
    flags = np.unpackbits(arrays["ends_document"], count=num_segments).view(bool).tolist()
    text = arrays["text"].tobytes()
    segments = []
    for s, ends_document in enumerate(flags):
        tokens = slice(token_bounds[s], token_bounds[s + 1])
        piece = text[text_bounds[s] : text_bounds[s + 1]]
        offsets = ends[tokens]
        if offsets.size and (
            offsets[0] < 0 or offsets[-1] > len(piece) or (offsets[1:] < offsets[:-1]).any()
        ):
            _refuse("ends", f"segment {s}'s offsets do not rise from 0 to at most its {len(piece)} bytes")
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            _refuse("text", f"segment {s} is not UTF-8: {error}")
        segments.append(
            Segment(
                text=piece,
                ids=ids[tokens],
                ends=offsets,
                ends_document=ends_document,
                domain=names["domains"][s],
                document=names["documents"][s],
            )
        )
    return segments


def _request_layout(segments: int, tokens: int, num_bytes: int) -> Layout:
    return _layout(
        text_lengths=("<u4", (segments,)),
        num_tokens=("<u4", (segments,)),
        ends_document=("|u1", (-(-segments // 8),)),
        ids=("<i4", (tokens,)),
        ends=("<i4", (tokens,)),
        text=("|u1", (num_bytes,)),
    )


# ---------------------------------------------------------------------------------------- container


def _layout(**arrays: tuple[DTypeLike, tuple[int, ...]]) -> Layout:
    return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in arrays.items()}


def _place(layout: Layout, start: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Byte range of each array, and the end of the last, when the arrays begin at or after `start`."""
    places, offset = {}, start
    for name, (dtype, shape) in layout.items():
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        places[name] = (offset, offset + size)
        offset += size
    return places, offset


def _describe(layout: Layout) -> list[list[Any]]:
    return [[name, dtype.str, list(shape)] for name, (dtype, shape) in layout.items()]


def _allocate(kind: int, header: dict[str, Any], layout: Layout) -> tuple[Buffer, dict[str, NDArray[Any]]]:
    """A buffer with prefix and header written, and writable views of its arrays."""
    packed = msgpack.packb({**header, "arrays": _describe(layout)})
    places, total = _place(layout, _PREFIX.size + len(packed))
    buffer = np.zeros(total, dtype=np.uint8)
    _PREFIX.pack_into(buffer.data, 0, _MAGIC, VERSION, kind, len(packed), 0, total)
    buffer[_PREFIX.size : _PREFIX.size + len(packed)] = np.frombuffer(packed, dtype=np.uint8)
    return buffer, {name: _view(buffer, places[name], layout[name]) for name in layout}


def _view(
    buffer: Buffer, place: tuple[int, int], entry: tuple[np.dtype[Any], tuple[int, ...]]
) -> NDArray[Any]:
    return buffer[place[0] : place[1]].view(entry[0]).reshape(entry[1])


def _open(buffer: Any, kind: int) -> tuple[dict[str, Any], int, Buffer]:
    """Check prefix and header; returns the header, the offset after it, and the whole buffer as bytes."""
    try:
        raw = np.frombuffer(buffer, dtype=np.uint8)
    except (TypeError, ValueError) as error:
        raise FrameError(
            f"frame: expected one contiguous buffer of bytes, got {type(buffer).__name__}: {error}"
        ) from None
    if len(raw) < _PREFIX.size:
        _refuse("length", f"{len(raw)} bytes are fewer than the prefix's {_PREFIX.size}")
    magic, version, seen_kind, header_bytes, zero, total = _PREFIX.unpack_from(raw.data)
    if magic != _MAGIC:
        _refuse("magic", f"{magic!r} is not {_MAGIC!r}; these bytes are no frame")
    if version != VERSION:
        _refuse("version", f"{version}, this process reads {VERSION}; run one release everywhere")
    if seen_kind != kind:
        _refuse("kind", f"{_KINDS.get(seen_kind, seen_kind)}, expected {_KINDS[kind]}")
    if total != len(raw):
        _refuse("length", f"{len(raw)} bytes arrived, {total} were sent; the frame is cut short or overlong")
    if zero or _PREFIX.size + header_bytes > len(raw):
        _refuse("header", f"its length {header_bytes} exceeds the frame's {len(raw)} bytes")
    try:
        header = msgpack.unpackb(raw[_PREFIX.size : _PREFIX.size + header_bytes].tobytes())
    except (
        Exception
    ) as error:  # msgpack raises what its input provokes, ValueError and UnicodeDecodeError among it
        raise FrameError(f"frame header: not msgpack ({type(error).__name__}: {error})") from None
    if type(header) is not dict:
        _refuse("header", f"expected a mapping, got {type(header).__name__}")
    return header, _PREFIX.size + header_bytes, raw


def _arrays(header: Mapping[str, Any], start: int, raw: Buffer, layout: Layout) -> dict[str, NDArray[Any]]:
    """Views of the arrays, once the header describes exactly the expected ones and they fill the frame."""
    described = header.get("arrays")
    if type(described) is not list or len(described) != len(layout):
        _refuse("arrays", f"expected {len(layout)} arrays, got {described!r:.200}")
    for entry, expected in zip(described, _describe(layout), strict=True):
        if entry != expected:
            _refuse(str(expected[0]), f"described as {entry!r:.200}, expected {expected!r}")
    places, total = _place(layout, start)
    if total != len(raw):
        _refuse("length", f"{len(raw)} bytes, its arrays need {total}")
    return {name: _view(raw, places[name], layout[name]) for name in layout}


def _length(header: Mapping[str, Any], field: str) -> int:
    value = header.get(field)
    if type(value) is not int or not 0 <= value < 1 << 32:
        _refuse(field, f"{value!r:.200} is no length")
    return value


def _bounds(lengths: NDArray[np.uint32], total: int, field: str) -> list[int]:
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()
    if bounds[-1] != total:
        _refuse(field, f"they add up to {bounds[-1]}, not to {total}")
    return bounds


def _expect(header: Mapping[str, Any], field: str, expected: str | int) -> None:
    seen = header.get(field)
    if type(seen) is not type(expected) or seen != expected:
        _refuse(field, f"{seen!r:.200}, expected {expected!r}")


def _refuse(field: str, problem: str) -> NoReturn:
    raise FrameError(f"frame {field}: {problem}")

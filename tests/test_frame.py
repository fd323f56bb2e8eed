"""The wire: what was written is what is read, and nothing else is."""

from __future__ import annotations

import dataclasses
import pickle
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.corpus.rows import Segment
from fusellm_ray.errors import FrameError
from fusellm_ray.stream import float16, frame
from fusellm_ray.stream.frame import answer_bytes, decode_frame, decode_request, encode_frame, encode_request

NAMES = {"teacher": "qwen", "fingerprint": "f" * 64}
SMALL, LARGE = 49_152, 262_144


def distribution(rng: np.random.Generator, n: int, k: int, vocab_size: int) -> Aligned:
    """An aligned segment: k candidates, gold and residual that sum to one; a tenth of it has no signal."""
    masses = rng.dirichlet(np.full(k + 2, 0.3), n)
    valid = rng.random(n) > 0.1
    with np.errstate(divide="ignore"):
        logs = np.log(masses).astype(np.float32)
    logs[~valid, :k] = -np.inf
    return Aligned(
        ids=rng.integers(0, vocab_size, (n, k), dtype=np.int32),
        logprobs=-np.sort(-logs[:, :k], axis=1),
        gold=logs[:, k],
        residual=np.where(valid, logs[:, k + 1], -np.inf).astype(np.float32),
        valid=valid,
        teacher_nats=float(rng.uniform(0, 100)),
        teacher_tokens=n + 3,
        teacher_bytes=4 * n,
    )


def batch(vocab_size: int, k: int = 16, lengths: tuple[int, ...] = (5, 0, 1, 700)) -> list[Aligned]:
    rng = np.random.default_rng(0)
    return [distribution(rng, n, k, vocab_size) for n in lengths]


def read(buffer: Any, parts: list[Aligned], vocab_size: int, **changes: Any) -> list[Aligned]:
    top_k = parts[0].ids.shape[1] if parts else 16
    asked = {**NAMES, "vocab_size": vocab_size, "top_k": top_k, "num_positions": [len(p.gold) for p in parts]}
    return decode_frame(buffer, **(asked | changes))


SEGMENTS = [
    Segment(
        text="Größe 今天\n".encode(),
        ids=np.array([1, 5, 9, 2], np.int32),
        ends=np.array([0, 7, 15, 15], np.int32),
        ends_document=True,
        domain="prose",
        document="a.jsonl:17",
    ),
    Segment(
        text=b"",
        ids=np.zeros(0, np.int32),
        ends=np.zeros(0, np.int32),
        ends_document=False,
        domain="code",
        document="b",
    ),
    Segment(
        text=b"x = 1",
        ids=np.array([7, 8], np.int32),
        ends=np.array([1, 5], np.int32),
        ends_document=False,
        domain="code",
        document="c",
    ),
]


# ---------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("vocab_size", [SMALL, 1 << 16, (1 << 16) + 1, LARGE])
def test_an_answer_survives_the_wire_within_the_precision_of_float16(vocab_size: int) -> None:
    parts = batch(vocab_size)
    seen = read(encode_frame(parts, **NAMES, vocab_size=vocab_size), parts, vocab_size)
    for sent, got in zip(parts, seen, strict=True):
        np.testing.assert_array_equal(got.ids, sent.ids)
        np.testing.assert_array_equal(got.valid, sent.valid)
        for name in ("logprobs", "gold", "residual"):
            sent_p, got_p = np.exp(getattr(sent, name)), np.exp(getattr(got, name))
            np.testing.assert_allclose(got_p, sent_p, atol=2e-3)
            np.testing.assert_array_equal(np.isinf(getattr(got, name)), np.isinf(getattr(sent, name)))
        assert (got.teacher_nats, got.teacher_tokens, got.teacher_bytes) == (
            sent.teacher_nats,
            sent.teacher_tokens,
            sent.teacher_bytes,
        )


def test_float32_is_rounded_to_float16_as_numpy_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    ties = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    beyond = np.array([65519.99, 65520, 7e4, -7e4, np.inf, -np.inf, 1e-9, -1e-30], np.float32)
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    values = np.concatenate([every, ties, *beside, beyond, drawn[~np.isnan(drawn)]])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(float16.rounded(values).view(np.uint16), expected.view(np.uint16))
    assert np.isnan(float16.rounded(np.full((2, 3), np.nan, np.float32))).all()


def test_probabilities_of_what_was_read_add_up_to_one_where_valid() -> None:
    parts = batch(SMALL)
    for part in read(encode_frame(parts, **NAMES, vocab_size=SMALL), parts, SMALL):
        assert (part.logprobs.dtype, part.gold.dtype, part.ids.dtype) == (np.float32, np.float32, np.int32)
        mass = np.exp(part.logprobs.astype(np.float64)).sum(1) + np.exp(part.gold) + np.exp(part.residual)
        np.testing.assert_allclose(mass[part.valid], 1.0, atol=1e-6)


@pytest.mark.parametrize(("vocab_size", "limit"), [(SMALL, 75), (LARGE, 110)])
def test_sixteen_candidates_cost_few_bytes_a_position(vocab_size: int, limit: int) -> None:
    parts = batch(vocab_size, lengths=(2048, 1000, 1000, 48))
    buffer = encode_frame(parts, **NAMES, vocab_size=vocab_size)
    assert buffer.nbytes / 4096 <= limit
    assert 0 <= buffer.nbytes - answer_bytes(4096, 16, vocab_size) < 1024


def test_an_empty_batch_is_a_frame() -> None:
    assert read(encode_frame([], **NAMES, vocab_size=SMALL), [], SMALL) == []
    assert decode_request(encode_request([]), vocab_size=SMALL) == []


def test_what_was_read_does_not_hold_on_to_the_buffer() -> None:
    parts = batch(SMALL)
    buffer = encode_frame(parts, **NAMES, vocab_size=SMALL)
    seen = read(buffer, parts, SMALL)
    before = seen[3].logprobs.copy()
    buffer[:] = 0
    np.testing.assert_array_equal(seen[3].logprobs, before)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher": "gemma"}, "teacher"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"vocab_size": SMALL - 1}, "vocab_size"),
        ({"num_positions": [5, 0, 1]}, "segments"),
        ({"num_positions": [5, 0, 1, 701]}, "positions"),
        ({"num_positions": [0, 5, 1, 700]}, "num_positions"),
    ],
)
def test_an_answer_to_another_question_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    parts = batch(SMALL)
    with pytest.raises(FrameError, match=f"frame {field}: "):
        read(encode_frame(parts, **NAMES, vocab_size=SMALL), parts, **{"vocab_size": SMALL, **changes})


def damaged(part: Aligned, name: str, index: Any, value: float) -> Aligned:
    array = getattr(part, name).copy()
    array[index] = value
    return dataclasses.replace(part, **{name: array})


@pytest.mark.parametrize(
    ("name", "index", "value", "field"),
    [
        ("ids", (3, 2), SMALL, "ids"),
        ("logprobs", (3, 2), np.nan, "logprobs"),
        ("gold", 3, np.nan, "gold"),
        ("residual", 3, np.nan, "residual"),
        ("logprobs", (3, 2), np.inf, "logprobs"),
        ("gold", 3, 0.5, "gold"),
        ("logprobs", 3, np.log(0.5), "logprobs"),
        ("valid", slice(None), True, "logprobs"),
    ],
)
def test_numbers_that_are_no_distribution_are_refused(
    name: str, index: Any, value: float, field: str
) -> None:
    parts = batch(SMALL)
    parts[3] = damaged(parts[3], name, index, value)
    with pytest.raises(FrameError, match=f"frame {field}: "):
        read(encode_frame(parts, **NAMES, vocab_size=SMALL), parts, SMALL)


def test_nats_that_are_not_finite_are_refused() -> None:
    parts = [dataclasses.replace(batch(SMALL)[0], teacher_nats=float("nan"))]
    with pytest.raises(FrameError, match="frame teacher_nats"):
        read(encode_frame(parts, **NAMES, vocab_size=SMALL), parts, SMALL)


# ---------------------------------------------------------------------------------------- requests


def test_a_request_survives_the_wire() -> None:
    for sent, got in zip(SEGMENTS, decode_request(encode_request(SEGMENTS), vocab_size=10), strict=True):
        assert (got.text, got.domain, got.document, got.ends_document) == (
            sent.text,
            sent.domain,
            sent.document,
            sent.ends_document,
        )
        np.testing.assert_array_equal(got.ids, sent.ids)
        np.testing.assert_array_equal(got.ends, sent.ends)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ids": np.array([7, 10], np.int32)}, "ids"),
        ({"ids": np.array([-1, 7], np.int32)}, "ids"),
        ({"ends": np.array([5, 1], np.int32)}, "ends"),
        ({"ends": np.array([1, 6], np.int32)}, "ends"),
        ({"text": b"x = \xff"}, "text"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(changes: dict[str, Any], field: str) -> None:
    segments = [*SEGMENTS[:2], dataclasses.replace(SEGMENTS[2], **changes)]
    with pytest.raises(FrameError, match=f"frame {field}: "):
        decode_request(encode_request(segments), vocab_size=10)


# ---------------------------------------------------------------------------------------- foreign bytes


def with_header(buffer: np.ndarray, **changes: Any) -> np.ndarray:
    """The frame again, its header changed and all lengths true."""
    size = frame._PREFIX.size
    magic, version, kind, header_bytes, zero, _ = frame._PREFIX.unpack_from(buffer.tobytes())
    header = msgpack.unpackb(buffer[size : size + header_bytes].tobytes())
    packed = msgpack.packb(header | changes)
    arrays = buffer[-(-(size + header_bytes) // 8) * 8 :].tobytes()
    padding = b"\0" * (-(size + len(packed)) % 8)
    total = size + len(packed) + len(padding) + len(arrays)
    prefix = frame._PREFIX.pack(magic, version, kind, len(packed), zero, total)
    return np.frombuffer(prefix + packed + padding + arrays, np.uint8)


def test_a_changed_header_is_refused_by_the_field_that_changed() -> None:
    parts = batch(SMALL)
    buffer = encode_frame(parts, **NAMES, vocab_size=SMALL)
    assert len(read(with_header(buffer), parts, SMALL)) == 4
    changes: list[tuple[str, Any]] = [
        ("teacher", None),
        ("segments", True),
        ("top_k", -1),
        ("top_k", "16"),
        ("top_k", 10**18),
        ("positions", 2**63),
        ("arrays", []),
        ("arrays", 7),
    ]
    for field, value in changes:
        with pytest.raises(FrameError, match=f"frame {field}: "):
            read(with_header(buffer, **{field: value}), parts, SMALL)
    with pytest.raises(FrameError, match="frame ids: described as"):
        read(with_header(buffer, top_k=15), parts, SMALL, top_k=15)


def test_foreign_and_cut_buffers_are_refused_by_name() -> None:
    parts = batch(SMALL)
    buffer = encode_frame(parts, **NAMES, vocab_size=SMALL)
    newer = buffer.copy()
    struct.pack_into("<H", newer.data, 4, frame.VERSION + 1)
    cases: list[tuple[Any, str]] = [
        (buffer[:10], "length"),
        (buffer[:-1], "length"),
        (np.append(buffer, np.uint8(0)), "length"),
        (np.zeros(1000, np.uint8), "magic"),
        (newer, "version"),
        (encode_request(SEGMENTS), "kind"),
    ]
    for foreign, field in cases:
        with pytest.raises(FrameError, match=f"frame {field}: "):
            read(foreign, parts, SMALL)
    for nothing in (None, 7, "frame", {"teacher": "qwen"}, buffer[::2], np.zeros((0, 3))):
        with pytest.raises(FrameError):
            read(nothing, parts, SMALL)


def test_reading_never_unpickles() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    parts = batch(SMALL)
    buffer = encode_frame(parts, **NAMES, vocab_size=SMALL)
    for payload in (pickle.dumps(Bomb()), msgpack.packb(msgpack.ExtType(1, pickle.dumps(Bomb())))):
        bomb = with_header(buffer, teacher=payload)
        with pytest.raises(FrameError, match="frame teacher"):
            read(bomb, parts, SMALL)


FUZZED = batch(SMALL, k=3, lengths=(4, 0, 9))
FUZZED_ANSWER = encode_frame(FUZZED, **NAMES, vocab_size=SMALL)
FUZZED_REQUEST = encode_request(SEGMENTS)
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


def mutated(buffer: np.ndarray, changes: list[tuple[float, int]], cut: float) -> np.ndarray:
    out = buffer[: max(1, int(len(buffer) * cut))].copy()
    for where, value in changes:
        out[int(where * len(out))] = value
    return out


@settings(max_examples=600, deadline=None)
@given(CHANGES, st.sampled_from([1.0, 1.0, 1.0, 0.5]))
def test_a_damaged_answer_is_either_a_distribution_or_a_frame_error(changes: Any, cut: float) -> None:
    try:
        seen = read(mutated(FUZZED_ANSWER, changes, cut), FUZZED, SMALL)
    except FrameError:
        return
    for part, asked in zip(seen, FUZZED, strict=True):
        assert part.ids.shape == asked.ids.shape
        assert ((part.ids >= 0) & (part.ids < SMALL)).all()
        mass = np.exp(part.logprobs).sum(1) + np.exp(part.gold) + np.exp(part.residual)
        np.testing.assert_allclose(mass[part.valid], 1.0, atol=1e-5)
        assert not np.isnan(part.gold).any()


@settings(max_examples=600, deadline=None)
@given(CHANGES, st.sampled_from([1.0, 1.0, 1.0, 0.5]))
def test_a_damaged_request_is_either_segments_or_a_frame_error(changes: Any, cut: float) -> None:
    try:
        seen = decode_request(mutated(FUZZED_REQUEST, changes, cut), vocab_size=10)
    except FrameError:
        return
    for segment in seen:
        segment.text.decode()
        assert ((segment.ids >= 0) & (segment.ids < 10)).all()
        assert (np.diff(segment.ends) >= 0).all()
        assert segment.ends.max(initial=0) <= len(segment.text)


@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_bytes_are_a_frame_error(data: bytes, has_prefix: bool) -> None:
    if has_prefix:
        size = frame._PREFIX.size
        data = frame._PREFIX.pack(b"FLRF", frame.VERSION, 2, len(data), 0, size + len(data)) + data
    with pytest.raises(FrameError):
        read(data, FUZZED, SMALL)

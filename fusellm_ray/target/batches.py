"""A rank's share of each global batch, joined with K teachers' distributions and on its device in time.

    corpus shards → rows → TeacherStream (requests ahead, credits) → fuse → device → queue → training step
                    └───────────────── one background thread ─────────────────┘

Row i of every global batch comes from virtual shard i, whoever reads it: batches do not depend on the number of
ranks, nor on what restarted on the way.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fusellm_ray.alignment.project import Aligned
from fusellm_ray.config import Config, FusionConfig, TeacherConfig
from fusellm_ray.corpus.rows import IGNORE_INDEX, Row, Segment, ShardReader, row_arrays
from fusellm_ray.fusion.fuse import Candidates, Fused, fuse
from fusellm_ray.stream.client import TeacherStream

Tree = TypeVar("Tree")
"""Tensors in dataclasses and tuples."""


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """What one teacher said of a micro-batch: N positions, S segments."""

    candidates: Candidates
    own_nats: Tensor
    """float64 [S]: nats on its own tokens"""
    own_tokens: Tensor
    """float64 [S]"""
    own_bytes: Tensor
    """float64 [S]"""
    is_dropped: bool = False
    """It was lost, and says nothing here."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B rows of L tokens in one forward pass; N of their positions have a next token to predict."""

    input_ids: Tensor
    """int64 [B, L]"""
    position_ids: Tensor
    """int64 [B, L], restarting with each segment"""
    positions: Tensor
    """int64 [N], into the flattened [B · L]"""
    gold: Tensor
    """int64 [N]"""
    gold_bytes: Tensor
    """float32 [N]"""
    segment: Tensor
    """int64 [N], index into the S segments"""
    domain: Tensor
    """int64 [S], index into the corpus's sources"""
    teachers: tuple[TeacherPart, ...]
    fused: Fused | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A rank's share of one global batch."""

    micro_batches: tuple[MicroBatch, ...]
    num_gold: int
    """Tokens to predict in this share."""
    cursors: dict[str, Any]
    """Shard → where its reader stands after this batch; JSON-able."""
    documents: tuple[tuple[str, ...], ...]
    """For each micro-batch, the document of each segment."""
    copied: torch.cuda.Event | None = None
    """Its tensors are on the GPU once this has happened; None on the CPU."""


class RankBatches:
    """Iterates over a rank's share of the global batches, working ahead in a background thread.

    Args:
        readers: the shards this rank reads, by shard number.
        stream: requests to the teachers; None for the CLM baseline.
        num_micro: forward passes a step, the same on every rank; ranks with fewer rows fill up with empty rows.
        num_batches: after so many the iteration ends, and no teacher is asked for more; None: it has no end.
        depth: finished batches kept ready.
    """

    def __init__(
        self,
        readers: dict[int, ShardReader],
        stream: TeacherStream | None,
        config: Config,
        *,
        pad_id: int,
        num_micro: int,
        device: torch.device,
        num_batches: int | None = None,
        depth: int = 2,
    ) -> None:
        self._readers = readers
        self._stream = stream
        self._config = config
        self._pad_id = pad_id
        self._num_micro = num_micro
        self._num_batches = num_batches
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._domains = {source.name: i for i, source in enumerate(config.corpus.sources)}
        self._read: deque[tuple[list[Row], dict[str, Any]]] = deque()
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def __next__(self) -> StepBatch:
        batch = self.get()
        assert batch is not None
        return batch

    def get(self, timeout_s: float | None = None) -> StepBatch | None:
        """The next batch, which later work on the device waits for; None if it did not come in time."""
        try:
            batch = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(batch, BaseException):
            raise batch
        return batch if batch.copied is None else after_copy(batch, batch.copied, self._device)

    def close(self) -> None:
        """Stop reading ahead; what is in flight is dropped."""
        self._closed.set()
        if self._stream is not None:
            self._stream.cancel()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(0.05)

    def _work(self) -> None:
        if self._copies is not None:  # threads start on the first GPU, and would take memory of it
            torch.cuda.set_device(self._copies.device)
        try:
            for segments, answers in self._joined():
                self._put(self._assemble(segments, answers))
                if self._closed.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _joined(self) -> Iterator[tuple[list[Segment], list[list[Aligned] | None]]]:
        batches = itertools.islice(self._segments(), self._num_batches)
        if self._stream is None:
            for segments in batches:
                yield segments, []
        else:
            yield from self._stream.join(batches)

    def _segments(self) -> Iterator[list[Segment]]:
        """Read the next row of every shard; the rows wait in `_read` until their answers have come."""
        while not self._closed.is_set():
            rows = [reader.next_row() for reader in self._readers.values()]
            cursors = {str(shard): reader.cursor() for shard, reader in self._readers.items()}
            self._read.append((rows, cursors))
            yield [segment for row in rows for segment in row.segments]

    def _assemble(self, segments: list[Segment], answers: list[list[Aligned] | None]) -> StepBatch:
        rows, cursors = self._read.popleft()
        micro_rows = self._config.training.micro_rows
        micro_batches, documents = [], []
        taken = 0
        for i in range(self._num_micro):
            some = rows[i * micro_rows : (i + 1) * micro_rows]
            count = sum(len(row.segments) for row in some)
            parts = [answer and answer[taken : taken + count] for answer in answers]
            taken += count
            micro = make_micro_batch(
                some or [Row(segments=())],
                parts if some else [],
                row_tokens=self._config.corpus.row_tokens,
                pad_id=self._pad_id,
                domains=self._domains,
                fusion=self._config.fusion,
                teachers=self._config.active_teachers,
                has_one_hot=self._config.alignment.has_one_hot,
            )
            micro_batches.append(micro)
            documents.append(tuple(segment.document for row in some for segment in row.segments))
        assert taken == len(segments)
        batch = StepBatch(
            micro_batches=tuple(micro_batches),
            num_gold=sum(segment.num_positions for segment in segments),
            cursors=cursors,
            documents=tuple(documents),
        )
        if self._copies is None:
            return batch
        batch, copied = begin_copy(batch, self._copies)
        return replace(batch, copied=copied)


def begin_copy(batch: Tree, copies: torch.cuda.Stream) -> tuple[Tree, torch.cuda.Event]:
    """Begin to copy every tensor of a batch to the GPU, beside what computes there; the event is its end."""
    with torch.cuda.stream(copies):  # copies of pageable memory would make this thread, and the GPU, wait
        sent = _each_tensor(batch, lambda tensor: tensor.pin_memory().to(copies.device, non_blocking=True))
        return sent, copies.record_event()


def after_copy(batch: Tree, copied: torch.cuda.Event, device: torch.device) -> Tree:
    """Let the calling thread's stream wait for a copy, without waiting here."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)

    def keep(tensor: Tensor) -> Tensor:
        # Its memory is the other stream's, which would else use it again for a batch while this one is read.
        tensor.record_stream(stream)
        return tensor

    return _each_tensor(batch, keep)


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same dataclasses and tuples with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_each_tensor(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: _each_tensor(getattr(value, field.name), change) for field in fields(value)}
        )
    return value


def make_micro_batch(
    rows: Sequence[Row],
    answers: Sequence[Sequence[Aligned] | None],
    *,
    row_tokens: int,
    pad_id: int,
    domains: dict[str, int],
    fusion: FusionConfig,
    teachers: Sequence[TeacherConfig],
    has_one_hot: bool = False,
) -> MicroBatch:
    """Rows and the teachers' answers to their segments, as tensors; the teachers fused.

    Args:
        answers: for each teacher, its answer to each segment of the rows, in order; None: it is lost. Empty:
            CLM only.
        has_one_hot: as `AlignmentConfig.has_one_hot`.
    """
    arrays = [row_arrays(row, row_tokens, pad_id) for row in rows]
    labels = torch.from_numpy(np.concatenate([a.labels for a in arrays]))
    positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    segments = [segment for row in rows for segment in row.segments]
    segment = torch.repeat_interleave(
        torch.arange(len(segments)), torch.tensor([s.num_positions for s in segments], dtype=torch.int64)
    )
    row_of_segment = torch.repeat_interleave(
        torch.arange(len(rows)), torch.tensor([len(row.segments) for row in rows], dtype=torch.int64)
    )
    gold_bytes = torch.from_numpy(np.concatenate([a.gold_bytes for a in arrays]))[positions].float()
    parts: tuple[TeacherPart, ...] = ()
    if segments:
        parts = tuple(
            _no_part(len(segment), len(segments), teacher.top_k) if answer is None else _teacher_part(answer)
            for answer, teacher in zip(answers, teachers if answers else (), strict=True)
        )
    fused = None
    if parts:
        fused = fuse(
            [part.candidates for part in parts],
            config=fusion,
            segment=segment,
            row=row_of_segment[segment],
            gold_bytes=gold_bytes,
            weights=[teacher.weight for teacher in teachers],
            own_nats=torch.stack([part.own_nats for part in parts]),
            own_tokens=torch.stack([part.own_tokens for part in parts]),
            own_bytes=torch.stack([part.own_bytes for part in parts]) if has_one_hot else None,
        )
    return MicroBatch(
        input_ids=torch.from_numpy(np.stack([a.input_ids for a in arrays])),
        position_ids=torch.from_numpy(np.stack([a.position_ids for a in arrays])),
        positions=positions,
        gold=labels[positions],
        gold_bytes=gold_bytes,
        segment=segment,
        domain=torch.tensor([domains[s.domain] for s in segments], dtype=torch.int64),
        teachers=parts,
        fused=fused,
    )


def _teacher_part(answer: Sequence[Aligned]) -> TeacherPart:
    def joined(name: str, dtype: np.typing.DTypeLike) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(part, name) for part in answer], dtype=dtype))

    return TeacherPart(
        candidates=Candidates(
            ids=joined("ids", np.int64),
            logprobs=joined("logprobs", np.float32),
            gold=joined("gold", np.float32),
            residual=joined("residual", np.float32),
            valid=joined("valid", np.bool_),
        ),
        own_nats=torch.tensor([part.teacher_nats for part in answer], dtype=torch.float64),
        own_tokens=torch.tensor([part.teacher_tokens for part in answer], dtype=torch.float64),
        own_bytes=torch.tensor([part.teacher_bytes for part in answer], dtype=torch.float64),
    )


def _no_part(num_positions: int, num_segments: int, top_k: int) -> TeacherPart:
    """Of a teacher that is lost."""
    nothing = torch.zeros(num_segments, dtype=torch.float64)
    return TeacherPart(Candidates.missing(num_positions, top_k), nothing, nothing, nothing, is_dropped=True)

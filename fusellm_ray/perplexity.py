"""Bits per byte: how well a model predicts held-out text, comparable between tokenizers.

    sources → documents → windows of tokens → packed rows → nats over predicted tokens / bytes they cover

A document longer than the model reads is scored in windows. Each window after the first begins with the last
token of the one before, as context only, so every token is predicted once; where the tokenizer adds a BOS, that
comes before it, as such models predict badly without. With a BOS a document's first token is predicted too;
without, there is nothing to predict it from, and its bytes are not counted either. The prediction of EOS is not
counted: it covers no bytes, and not every model learned it.

Used by a process of its own, and by trainer ranks on the sharded target (each takes its share of batches).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fusellm_ray.config import CorpusConfig, ModelConfig, SourceConfig
from fusellm_ray.corpus.rows import IGNORE_INDEX, Row, Segment, row_arrays
from fusellm_ray.corpus.source import Corpus, Document
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import CorpusError, ModelError
from fusellm_ray.models import HeadedModel, check_structure, load_causal_lm, model_facts

MEASURE = 2
"""Of scores that are kept in files: it changes when the same model pays another number of nats for the same text."""
CHUNK_TOKENS = 512
"""Positions whose logits exist at once."""


@dataclass(frozen=True, slots=True)
class DomainScore:
    """Sums over one domain's text; add the parts of several ranks up."""

    nats: float
    bytes: int
    """That the predicted tokens cover."""
    tokens: int
    """Predicted."""
    documents: int
    """Scored to their end."""

    @property
    def bits_per_byte(self) -> float:
        """NaN where no byte was scored."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def __add__(self, other: DomainScore) -> DomainScore:
        return DomainScore(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


NOTHING = DomainScore(0.0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """One document's sums: what two models are compared on, document by document."""

    domain: str
    name: str
    nats: float
    bytes: int
    """That the predicted tokens cover; 0 for a document without any."""
    tokens: int


def by_domain(documents: Iterable[DocumentScore]) -> dict[str, DomainScore]:
    """Add up the documents of which anything was predicted."""
    scores: dict[str, DomainScore] = {}
    for d in documents:
        if not d.tokens:
            continue
        scores[d.domain] = scores.get(d.domain, NOTHING) + DomainScore(d.nats, d.bytes, d.tokens, 1)
    return scores


def held_out_documents(sources: Sequence[SourceConfig], max_bytes: int) -> list[Document]:
    """The first `max_bytes` bytes of each source, in its own order: the same text for any model.

    The last document is cut at a character, so that a source gives no more than that.
    """
    documents = []
    for source in sources:
        room = max_bytes
        for document in Corpus.open(CorpusConfig(sources=[source], shuffle=False), seed=0).documents(0, 1):
            if document.epoch > 0 or room <= 0:
                break
            data = document.text.encode()
            documents.append(replace(document, text=data[:room].decode(errors="ignore")))
            room -= len(data)
    return documents


def load_model(
    config: ModelConfig, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[HeadedModel, ByteTokenizer, int]:
    """A model to score, its tokenizer, and the tokens it reads at once.

    Raises:
        ModelError, TokenizerError: it cannot be loaded, or cannot keep packed documents apart.
    """
    facts = model_facts(config)
    tokenizer = ByteTokenizer.of_model(config, facts.vocab_size)
    causal_lm = load_causal_lm(config, dtype=dtype)
    causal_lm.to(device)  # type: ignore[arg-type]
    check_structure(causal_lm)
    return HeadedModel(causal_lm), tokenizer, facts.max_context


def evaluate_model(
    config: ModelConfig,
    documents: Iterable[Document],
    *,
    row_tokens: int = 2048,
    batch_rows: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[DocumentScore]:
    """Load a model and score documents with it; `row_tokens` is lowered to what it reads at once.

    Raises:
        ModelError: it cannot be loaded, or is too large for the device.
    """
    try:
        model, tokenizer, context = load_model(config, device=device, dtype=dtype)
        return score_documents(
            model, tokenizer, documents, row_tokens=min(row_tokens, context), batch_rows=batch_rows
        )
    except torch.OutOfMemoryError as error:
        problem = str(error)
    # Outside, where nothing holds on to the model any more.
    raise ModelError(
        f"{config.model}: too little memory on {device} to read {batch_rows} × {row_tokens} tokens at once "
        f"({problem}); read fewer, free the GPU, or hide it to score on the CPU (CUDA_VISIBLE_DEVICES=)"
    )


def score_documents(
    model: HeadedModel,
    tokenizer: ByteTokenizer,
    documents: Iterable[Document],
    *,
    row_tokens: int,
    batch_rows: int,
) -> list[DocumentScore]:
    """Score documents one by one, in their order; the arguments are those of `bits_per_byte`."""
    documents = list(documents)
    owners, windows = [], []
    for number, document in enumerate(documents):
        for window in _windows(document, tokenizer, row_tokens):
            owners.append(number)
            windows.append(window)
    sums = [NOTHING] * len(documents)
    for index, score in _score_windows(model, tokenizer, windows, row_tokens, batch_rows, 0, 1):
        sums[owners[index]] += score
    return [
        DocumentScore(d.domain, d.name, s.nats, s.bytes, s.tokens)
        for d, s in zip(documents, sums, strict=True)
    ]


def bits_per_byte(
    model: HeadedModel,
    tokenizer: ByteTokenizer,
    documents: Iterable[Document],
    *,
    row_tokens: int,
    batch_rows: int,
    shard: int = 0,
    num_shards: int = 1,
) -> dict[str, DomainScore]:
    """Score documents, by domain.

    Args:
        documents: finite, the same on every rank.
        row_tokens: tokens of a row, and so of a window; at most what the model reads at once.
        shard: this rank. All ranks make equally many forward passes, as a sharded model requires.
        num_shards: number of ranks.

    Returns:
        Domain → this shard's sums, for every domain of the documents; `sum_over_ranks` adds them up.

    Raises:
        CorpusError: there is no document.
    """
    windows = [w for document in documents for w in _windows(document, tokenizer, row_tokens)]
    scores = {window.segment.domain: NOTHING for window in windows}
    for index, score in _score_windows(model, tokenizer, windows, row_tokens, batch_rows, shard, num_shards):
        scores[windows[index].segment.domain] += score
    return scores


@torch.no_grad()
def _score_windows(
    model: HeadedModel,
    tokenizer: ByteTokenizer,
    windows: Sequence[_Window],
    row_tokens: int,
    batch_rows: int,
    shard: int,
    num_shards: int,
) -> Iterator[tuple[int, DomainScore]]:
    """(index of a window, its sums) of this shard's windows."""
    if not windows:
        raise CorpusError("no held-out text to score; give evaluation sources that hold some")
    rows = list(_packed((window.segment for window in windows), row_tokens))
    # One shape for all batches, so that a compiled model is compiled for it once.
    length = max(sum(len(window.ids) for window in row.segments) for row in rows)
    starts = range(0, len(rows), batch_rows)
    batches = [rows[start : start + batch_rows] for start in starts]
    windows_before = np.cumsum([0] + [len(row.segments) for row in rows])
    for first in range(0, len(batches), num_shards):
        is_mine = first + shard < len(batches)
        number = first + shard if is_mine else 0
        index = int(windows_before[starts[number]])
        sums = _score(model, batches[number], windows[index:], length, tokenizer.eos_id or 0)
        for i, score in enumerate(sums, index):
            if is_mine:
                yield i, score


def sum_over_ranks(scores: Mapping[str, DomainScore]) -> dict[str, DomainScore]:
    """Add all ranks' sums up; every rank must call it, with the same domains."""
    sums = torch.tensor([astuple(score) for score in scores.values()], dtype=torch.float64)
    if dist.is_initialized():
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        sums = sums.to(device)
        dist.all_reduce(sums)
    return {
        domain: DomainScore(nats, int(num_bytes), int(tokens), int(documents))
        for domain, (nats, num_bytes, tokens, documents) in zip(scores, sums.tolist(), strict=True)
    }


@dataclass(frozen=True, slots=True)
class _Window:
    segment: Segment
    num_repeated: int = 0
    """Predictions at its start that are not counted: another window made them."""


def token_windows(
    ids: NDArray[np.int32], limit: int, bos_id: int | None
) -> Iterator[tuple[int, int, NDArray[np.int32]]]:
    """(start, stop, what is read) of each window: `ids[start:stop]`, after the first window with a BOS before it.

    Args:
        ids: of a whole document, with BOS if the tokenizer adds one.
        limit: tokens that are read at once, at least 2.
        bos_id: what the tokenizer adds; under a limit of 2 there is no room to repeat it.

    Example: reading 0..9 by 4 with BOS 0 → 0123, 0345, 0567, 0789; 3, 5 and 7 are context the second time.
    """
    prefix = np.array([] if bos_id is None or limit == 2 else [bos_id], np.int32)
    start, stop = 0, limit
    while start < len(ids) - 1:
        own = ids[start:stop]
        yield start, start + len(own), np.concatenate([prefix, own]) if start else own
        start = stop - 1
        stop = start + limit - len(prefix)


def _windows(document: Document, tokenizer: ByteTokenizer, limit: int) -> Iterator[_Window]:
    tokens = tokenizer.sequence(document.text, ends_document=False)
    data = document.text.encode()
    for start, stop, read in token_windows(tokens.ids, limit, tokenizer.bos_id):
        num_repeated = len(read) - (stop - start)
        begin = tokens.ends[start - num_repeated]  # of the first token that is predicted
        ends = np.concatenate([np.full(num_repeated, begin), tokens.ends[start:stop]]).astype(np.int32)
        segment = Segment(
            text=data[begin : ends[-1]],
            ids=read,
            ends=ends - begin,
            ends_document=stop == len(tokens.ids),
            domain=document.domain,
            document=document.name,
        )
        yield _Window(segment, num_repeated)


def _packed(windows: Iterable[Segment], row_tokens: int) -> Iterator[Row]:
    row: list[Segment] = []
    room = row_tokens
    for window in windows:
        if len(window.ids) > room:
            yield Row(tuple(row))
            row, room = [], row_tokens
        row.append(window)
        room -= len(window.ids)
    yield Row(tuple(row))


def _score(
    model: HeadedModel, rows: list[Row], windows: Sequence[_Window], length: int, pad_id: int
) -> Iterator[DomainScore]:
    """The sums of each window, which come in the order in which the rows hold them."""
    arrays = [row_arrays(row, length, pad_id) for row in rows]
    device = next(model.parameters()).device

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(a, name) for a in arrays])).to(device)

    labels = stack("labels").flatten()

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pairs = zip(hidden.flatten(0, 1).split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
        return torch.cat(
            [
                cross_entropy(
                    linear(states, weight, bias).float(), gold, ignore_index=IGNORE_INDEX, reduction="none"
                )
                for states, gold in pairs
            ]
        )

    nats = (
        model(stack("input_ids"), stack("position_ids"), head)
        .reshape(len(rows), length)
        .double()
        .cpu()
        .numpy()
    )
    left = iter(windows)
    for row, a, row_nats in zip(rows, arrays, nats, strict=True):
        for i in range(len(row.segments)):
            window = next(left)
            own = np.flatnonzero(a.segment == i)[window.num_repeated :]
            yield DomainScore(
                nats=float(row_nats[own].sum()),
                bytes=int(a.gold_bytes[own].sum()),
                tokens=len(window.segment.ids) - 1 - window.num_repeated,
                documents=int(window.segment.ends_document),
            )

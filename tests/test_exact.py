"""A step does not depend on how its rows are spread over ranks and micro-batches.

Ranks are real gloo processes and run the trainer's own step. Their teachers are real, too, but live in the rank's
process: what crosses Ray is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fusellm_ray.config import parse_config
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.models import model_facts
from fusellm_ray.stream.client import TeacherAddress
from fusellm_ray.stream.frame import decode_frame, encode_request
from fusellm_ray.target.batches import RankBatches
from fusellm_ray.target.collectives import sum_over_ranks
from fusellm_ray.target.model import build_target, make_optimizer
from fusellm_ray.target.worker import Progress, Rank, TrainTask, _step
from fusellm_ray.teachers.scoring import TeacherScorer
from tests.ranks import run_ranks
from tests.runs import build_run

STEPS = 20


class LocalStream:
    """`TeacherStream` without the wire's two ends: requests and frames are made, sent nowhere, and read."""

    def __init__(self, scorers, teachers, vocab_size):
        self._scorers, self._teachers, self._vocab_size = scorers, teachers, vocab_size
        self._loop = asyncio.new_event_loop()

    def join(self, batches):
        for segments in batches:
            yield (
                segments,
                [self._answers(*pair, segments) for pair in zip(self._scorers, self._teachers, strict=True)],
            )

    def _answers(self, scorer, teacher, segments):
        frame = self._loop.run_until_complete(scorer.answer(encode_request(segments)))
        return decode_frame(
            frame,
            teacher=teacher.name,
            fingerprint=scorer.fingerprint,
            vocab_size=self._vocab_size,
            top_k=teacher.top_k,
            num_positions=[segment.num_positions for segment in segments],
        )

    def cancel(self):
        pass


def losses(mesh, tree):
    """The loss of each step, as every rank knows it."""
    config = parse_config(tree)
    device = torch.device("cpu")
    vocab_size = model_facts(config.target).vocab_size
    tokenizer = ByteTokenizer.of_model(config.target, vocab_size)
    scorers = [TeacherScorer(t, config.target, config.alignment) for t in config.active_teachers]
    addresses = tuple(
        TeacherAddress(name=t.name, fingerprint=s.fingerprint, top_k=t.top_k, pool=None)
        for t, s in zip(config.active_teachers, scorers, strict=True)
    )
    model = build_target(config.target, mesh)
    rank = Rank(
        task=TrainTask(config=config, teachers=addresses, control=None, identity={}),
        index=mesh.get_rank(),
        num_ranks=mesh.size(),
        device=device,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        model=model,
        optimizer=make_optimizer(model, config.training),
        held_out=[],
        metrics=None,
    )
    corpus = Corpus.open(config.corpus, config.run.seed)
    num_rows = config.training.batch_rows
    batches = RankBatches(
        {
            shard: ShardReader(corpus, tokenizer, shard, num_rows, config.corpus.row_tokens)
            for shard in range(rank.index, num_rows, rank.num_ranks)
        },
        LocalStream(scorers, config.active_teachers, vocab_size) if scorers else None,
        config,
        pad_id=0,
        num_micro=math.ceil(math.ceil(num_rows / rank.num_ranks) / config.training.micro_rows),
        device=device,
    )
    progress = Progress()
    seen = []
    for progress.step in range(STEPS):
        batch = next(batches)
        (num_gold,) = sum_over_ranks([batch.num_gold], device)
        seen.append(_step(rank, batch, progress, num_gold, 0.0)["loss"])
    batches.close()
    return seen


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> dict[str, Any]:
    return build_run(
        tmp_path_factory.mktemp("run"),
        tokenizer_folders,
        training={"steps": STEPS, "batch_rows": 4, "micro_rows": 4},
    )


def test_losses_of_one_rank_or_two_and_accumulation_1_or_4_are_the_same(tree: dict[str, Any]):
    (wanted,) = run_ranks(1, losses, tree)
    accumulating = tree | {"training": tree["training"] | {"micro_rows": 1}}
    for num_ranks, changed in ((1, accumulating), (2, tree), (2, accumulating)):
        for seen in run_ranks(num_ranks, losses, changed):
            assert seen == pytest.approx(wanted, rel=1e-6)


class EagerStream:
    """Answers as a stream without teachers; reads up to ten batches ahead and counts them."""

    def __init__(self) -> None:
        self.asked = 0

    def join(self, batches):
        ahead = list(itertools.islice(batches, 10))
        self.asked += len(ahead)
        for segments in ahead:
            yield segments, []

    def cancel(self):
        pass


def test_no_teacher_is_asked_for_more_than_the_steps_that_are_left(tree: dict[str, Any]):
    config = parse_config(tree)
    tokenizer = ByteTokenizer.of_model(config.target)
    corpus = Corpus.open(config.corpus, config.run.seed)
    stream = EagerStream()
    batches = RankBatches(
        {0: ShardReader(corpus, tokenizer, 0, 1, config.corpus.row_tokens)},
        stream,
        config,
        pad_id=0,
        num_micro=1,
        device=torch.device("cpu"),
        num_batches=3,
    )
    for _ in range(3):
        assert next(batches).num_gold > 0
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()
    assert stream.asked == 3

"""A step does not depend on how its rows are spread over ranks and micro-batches.

Ranks are real gloo processes and run the trainer's own step. Their teachers are real, too, but live in the rank's
process: what crosses Ray is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from fusellm_ray.config import EarlyStop
from fusellm_ray.config_file import parse_config
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ModelError
from fusellm_ray.models import model_facts
from fusellm_ray.stream.client import TeacherAddress
from fusellm_ray.stream.frame import decode_frame, encode_request
from fusellm_ray.target.batches import RankBatches
from fusellm_ray.target.checkpoint import training_tensors, write_checkpoint
from fusellm_ray.target.collectives import sum_over_ranks
from fusellm_ray.target.evaluation import Best
from fusellm_ray.target.model import build_target, make_optimizer
from fusellm_ray.target.worker import Progress, Rank, TrainTask, _restore, _step
from fusellm_ray.teachers.scoring import TeacherScorer
from tests.ranks import run_ranks
from tests.runs import build_run

STEPS = 20

IDENTITY = {"corpus": {}, "batch_rows": 4, "seed": 0}


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


def opened(mesh, tree):
    """A rank as the trainer has it, and its batches."""
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
        task=TrainTask(config=config, teachers=addresses, control=None, identity=IDENTITY),
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
    return rank, batches


def losses(mesh, tree):
    """The loss of each step, as every rank knows it."""
    rank, batches = opened(mesh, tree)
    progress = Progress()
    seen = []
    for progress.step in range(STEPS):
        batch = next(batches)
        (num_gold,) = sum_over_ranks([batch.num_gold], rank.device)
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


def test_losses_of_any_number_of_ranks_and_micro_batches_are_the_same(tree: dict[str, Any]):
    (wanted,) = run_ranks(1, losses, tree)
    for num_ranks, micro_rows in (
        (1, 1),
        (2, 4),
        (2, 1),
        (1, 3),  # a micro-batch of three rows, one of one
        (3, 1),  # one rank has two rows, the others fill up with an empty one
    ):
        changed = tree | {"training": tree["training"] | {"micro_rows": micro_rows}}
        for seen in run_ranks(num_ranks, losses, changed):
            assert seen == pytest.approx(wanted, rel=1e-6), (num_ranks, micro_rows)


def skips(mesh, tree, poisoned_rank):
    """A skipped step's figures, the error of the next, and the documents of the poisoned row; weights stay."""
    rank, batches = opened(mesh, tree)
    before = [parameter.to_local().clone() for parameter in rank.model.parameters()]
    progress, poisoned = Progress(), []
    for progress.step in range(2):
        batch = next(batches)
        (num_gold,) = sum_over_ranks([batch.num_gold], rank.device)
        if rank.index == poisoned_rank:
            micro = batch.micro_batches[1]
            segment = int(micro.segment[-1])
            micro.fused.residual[micro.segment == segment] = math.nan
            poisoned.append(batch.documents[1][segment])
        try:
            figures = _step(rank, batch, progress, num_gold, 0.0)
        except ModelError as error:
            text = str(error)
    batches.close()
    after = [parameter.to_local() for parameter in rank.model.parameters()]
    return figures, text, poisoned, all(map(torch.equal, before, after))


def test_a_skipped_step_names_the_document_that_is_no_number_and_its_rank_alone(tree: dict[str, Any]):
    changed = tree | {"training": tree["training"] | {"micro_rows": 1, "max_skipped_steps": 1}}
    told = run_ranks(2, skips, changed, 1)
    first, second = told[1][2]
    for figures, error, _, is_unchanged in told:
        assert math.isnan(figures["loss"])
        assert figures["skipped_steps"] == 1
        assert figures["skipped_documents"] == f"rank 1: {first}"
        assert f"documents: rank 1: {second};" in error
        assert is_unchanged


def restored(mesh, tree, folder):
    """Whether a group that starts again from a checkpoint of an exhausted run knows that it is, by early_stop."""
    rank, batches = opened(mesh, tree)
    batches.close()
    state = {
        "step": 4,
        "skipped": 0,
        "cursors": {},
        "best": asdict(Best()),
        "stopped_early": True,
        "identity": IDENTITY,
    }
    write_checkpoint(folder, training_tensors(rank.model, rank.optimizer), state)
    told = []
    for early_stop in (EarlyStop(patience=1), None):
        training = rank.config.training.model_copy(update={"early_stop": early_stop})
        config = rank.config.model_copy(update={"training": training})
        same = replace(rank, task=replace(rank.task, config=config))
        told.append(_restore(same, ray.train.Checkpoint(folder)).stopped_early)
    return told


def test_a_group_that_starts_again_after_an_early_stop_does_not_train_on(
    tree: dict[str, Any], tmp_path: Path
):
    assert run_ranks(1, restored, tree, str(tmp_path)) == [[True, False]]


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

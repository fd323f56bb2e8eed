"""A trainer rank from its start to its end: every worker of Ray Train calls `train_loop`.

    restore or begin → for each step: take the joined batch → forward and backward → step → record
                                      → (evaluate) → (checkpoint, written while the next steps run)

All that differs between ranks is which rows they read. Every sum is over all ranks, and every decision (skip, stop,
checkpoint) is taken from such a sum, so ranks never part ways. A rank whose batch does not come would keep the others
waiting in that sum: where a stop is wanted it joins them without one, and all end before the step.
"""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
import torch
from torch.distributed.device_mesh import init_device_mesh

from fusellm_ray.config import Config
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus, Document
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ModelError
from fusellm_ray.fusion.loss import ObjectiveOutput, objective
from fusellm_ray.models import HeadedModel, model_facts, use_cpu
from fusellm_ray.observe.metrics import RankMetrics
from fusellm_ray.perplexity import held_out_documents
from fusellm_ray.stream.client import TeacherStream
from fusellm_ray.target import evaluation
from fusellm_ray.target.batches import MicroBatch, RankBatches, StepBatch
from fusellm_ray.target.checkpoint import is_same_order, load_checkpoint, read_state
from fusellm_ray.target.collectives import gather_json, sum_over_ranks
from fusellm_ray.target.model import (
    build_target,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from fusellm_ray.target.saving import CheckpointWriter
from fusellm_ray.target.statistics import StepStatistics
from fusellm_ray.target.task import TrainTask

STOP_POLL_S = 2.0
"""A rank that waits for its batch asks this often whether the run should stop."""
_EXHAUSTED = "stopped early: held-out bits per byte no longer improve"
_MAX_DOCUMENTS = 8
"""Named of each rank where a step is skipped."""


@dataclass(slots=True)
class Progress:
    """Where training stands; saved with every checkpoint."""

    step: int = 0
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    cursors: dict[str, Any] | None = None
    """Shard → cursor of its reader, of all ranks; None at the start."""
    best: evaluation.Best = field(default_factory=evaluation.Best)
    stopped_early: bool = False


@dataclass(frozen=True)
class Rank:
    """What a rank works with."""

    task: TrainTask
    index: int
    num_ranks: int
    device: torch.device
    tokenizer: ByteTokenizer
    vocab_size: int
    model: HeadedModel
    optimizer: torch.optim.Optimizer
    held_out: list[Document]
    metrics: RankMetrics

    @property
    def config(self) -> Config:
        return self.task.config

    def record(self, event: str, **figures: Any) -> ray.ObjectRef | None:
        """Tell the driver; only rank 0 does. The answer is the driver's reason to stop, or None."""
        if self.index != 0:
            return None
        self.metrics.record(event, figures)
        return self.task.control.record.remote({"event": event} | figures)

    def stop_reason(self) -> str | None:
        """Why the driver wants the run to end, if it does."""
        answer: ray.ObjectRef = self.task.control.stop_reason.remote()
        return ray.get(answer)


def train_loop(task: TrainTask) -> None:
    """Train to the end, or until the driver asks to stop; the last thing done is a checkpoint."""
    rank = _set_up(task)
    config = rank.config
    progress = _restore(rank, ray.train.get_checkpoint())
    rank.record("start", step=progress.step, ranks=rank.num_ranks)
    writer = CheckpointWriter(lambda step, s: rank.record("checkpoint", step=step, seconds=s))
    batches = _open_batches(rank, progress)
    gc.collect()
    gc.freeze()  # what is loaded by now stays: no collection need look through it again
    saved_step = progress.step
    stop_reason: str | None = _EXHAUSTED if progress.stopped_early else None
    answer: ray.ObjectRef | None = None  # to the latest record: the driver's wish, read one step later
    try:
        while progress.step < config.training.steps and stop_reason is None:
            started = time.perf_counter()
            batch = _next_batch(rank, batches)
            waited_s = time.perf_counter() - started
            wish = ray.get(answer) if answer is not None else None
            num_gold, num_lacking, num_wishes = sum_over_ranks(
                [batch.num_gold if batch else 0, batch is None, wish is not None], rank.device
            )
            if num_lacking or num_wishes:
                stop_reason = rank.stop_reason()
            if batch is None or num_lacking:
                if progress.step > saved_step:
                    _save(rank, progress, writer, is_due=True, is_best=False)
                break

            figures = _step(rank, batch, progress, num_gold, waited_s)
            progress.step += 1
            progress.cursors = batch.cursors
            seconds = time.perf_counter() - started
            figures["perf/tokens_per_s"] = figures["tokens"] / seconds
            figures["time/step_s"] = seconds
            figures["time/wait_share"] = figures["time/wait_s"] / seconds
            rank.metrics.step(wait_share=waited_s / seconds, tokens_per_s=batch.num_gold / seconds)
            answer = rank.record("step", step=progress.step, steps=config.training.steps, **figures)

            is_best = evaluation.is_due(config, progress.step) and _evaluate(rank, progress)
            if progress.stopped_early:
                stop_reason = _EXHAUSTED
            is_last = progress.step == config.training.steps or stop_reason is not None
            is_due = is_last or progress.step - saved_step >= config.checkpoint.every_steps
            writer.check()
            if is_due or (is_best and config.checkpoint.keep_best):
                _save(rank, progress, writer, is_due=is_due, is_best=is_best and config.checkpoint.keep_best)
            if is_due:
                saved_step = progress.step
        writer.wait()
    finally:
        batches.close()
    end = rank.record("end", step=progress.step, reason=stop_reason or "finished")
    if end is not None:
        ray.get(end)


def _set_up(task: TrainTask) -> Rank:
    config = task.config
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        use_cpu(config.trainer.threads)
    facts = model_facts(config.target)
    model = build_target(config.target, init_device_mesh(device.type, (context.get_world_size(),)))
    evaluation = config.evaluation
    return Rank(
        task=task,
        index=context.get_world_rank(),
        num_ranks=context.get_world_size(),
        device=device,
        tokenizer=ByteTokenizer.of_model(config.target, facts.vocab_size),
        vocab_size=facts.vocab_size,
        model=model,
        optimizer=make_optimizer(model, config.training),
        held_out=held_out_documents(evaluation.sources, evaluation.max_bytes) if evaluation.sources else [],
        metrics=RankMetrics(config.run.name, context.get_world_rank()),
    )


def _open_batches(rank: Rank, progress: Progress) -> RankBatches:
    config = rank.config
    corpus = Corpus.open(config.corpus, config.run.seed)
    num_shards = config.training.batch_rows
    cursors = progress.cursors or {}
    readers = {
        shard: ShardReader(
            corpus,
            rank.tokenizer,
            shard,
            num_shards,
            config.corpus.row_tokens,
            cursor=cursors.get(str(shard)),
        )
        for shard in range(rank.index, num_shards, rank.num_ranks)
    }
    teachers = rank.task.teachers
    return RankBatches(
        readers,
        TeacherStream(teachers, config.stream, rank.vocab_size, rank.index) if teachers else None,
        config,
        pad_id=rank.tokenizer.eos_id or 0,
        num_micro=math.ceil(math.ceil(num_shards / rank.num_ranks) / config.training.micro_rows),
        device=rank.device,
        num_batches=config.training.steps - progress.step,
    )


def _next_batch(rank: Rank, batches: RankBatches) -> StepBatch | None:
    """The next batch; None if it has not come and the run should stop."""
    while (batch := batches.get(STOP_POLL_S)) is None:
        if rank.stop_reason() is not None:
            return None
    return batch


# ---------------------------------------------------------------------------------------- one step


def _step(
    rank: Rank, batch: StepBatch, progress: Progress, num_gold: float, waited_s: float
) -> dict[str, Any]:
    """One optimiser step; returns its figures, the same on every rank."""
    training = rank.config.training
    statistics = StepStatistics(
        [t.name for t in rank.task.teachers],
        [s.name for s in rank.config.corpus.sources],
        rank.device,
        has_one_hot=rank.config.alignment.has_one_hot,
    )
    statistics.add_wait(waited_s)
    # Randomness (LoRA's dropout) depends on run, step and rank alone, so there is no generator state to save.
    torch.manual_seed(hash((rank.config.run.seed, progress.step, rank.index)) % 2**63)
    outputs = []
    for micro in batch.micro_batches:
        started = time.thread_time()
        output = _forward(rank, micro, denominator=num_gold)
        output.loss.backward()
        statistics.add_compute(time.thread_time() - started)
        statistics.add(micro, output)
        outputs.append(replace(output, loss=output.loss.detach()))
    statistics.reduce()
    figures: dict[str, Any] = statistics.figures()
    grad_norm = clip_gradients(rank.model, training.clip_norm)
    lr = learning_rate(progress.step, training)
    set_learning_rate(rank.optimizer, lr)
    if math.isfinite(figures["loss"]) and math.isfinite(grad_norm):
        rank.optimizer.step()
    else:
        progress.skipped += 1
        suspects = _suspects(batch, outputs)
        figures["skipped_documents"] = suspects
        if progress.skipped > training.max_skipped_steps:
            raise ModelError(
                f"step {progress.step + 1}: loss {figures['loss']} and gradient norm {grad_norm} are not finite, "
                f"for the {progress.skipped}. time (training.max_skipped_steps={training.max_skipped_steps}); "
                f"documents: {suspects}; lower training.lr or look at them"
            )
    rank.optimizer.zero_grad(set_to_none=True)
    return figures | {"grad_norm": grad_norm, "lr": lr, "skipped_steps": progress.skipped}


def _suspects(batch: StepBatch, outputs: Sequence[ObjectiveOutput]) -> str:
    """The documents, by rank, at whose positions the loss is not finite; all if that holds for none."""
    bad: list[str] = []
    for micro, documents, output in zip(batch.micro_batches, batch.documents, outputs, strict=True):
        is_bad = ~(output.clm + output.fusion).isfinite()
        bad += [documents[i] for i in micro.segment[is_bad].unique().tolist()]
    everything = [name for documents in batch.documents for name in documents]
    told = gather_json([list(dict.fromkeys(names)) for names in (bad, everything)])
    has_bad = any(names for names, _ in told)
    named = [names if has_bad else every for names, every in told]
    return "; ".join(_listed(index, names) for index, names in enumerate(named) if names)


def _listed(rank_index: int, names: Sequence[str]) -> str:
    num_left_out = max(len(names) - _MAX_DOCUMENTS, 0)
    more = f" and {num_left_out} more" if num_left_out else ""
    return f"rank {rank_index}: {', '.join(names[:_MAX_DOCUMENTS])}{more}"


def _forward(rank: Rank, batch: MicroBatch, *, denominator: float) -> ObjectiveOutput:
    config = rank.config

    def head(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        output = objective(
            hidden.flatten(0, 1)[batch.positions],
            weight,
            bias,
            batch.gold,
            batch.fused,
            config=config.objective,
            denominator=denominator,
            gate_segment=batch.segment if config.fusion.gate == "live_target" else None,
        )
        return output.loss, output.clm, output.fusion, output.listened

    loss, clm, fusion, listened = rank.model(batch.input_ids, batch.position_ids, head)
    return ObjectiveOutput(loss=loss, clm=clm, fusion=fusion, listened=listened)


def _evaluate(rank: Rank, progress: Progress) -> bool:
    """Bits per byte on the held-out text, and samples; True if the target is the best so far."""
    config, is_best = rank.config, False
    if rank.held_out:
        figures = evaluation.held_out_figures(
            rank.model, rank.tokenizer, rank.held_out, config, rank=rank.index, num_ranks=rank.num_ranks
        )
        rank.record("evaluation", step=progress.step, **figures)
        is_best = progress.best.add(figures["bits_per_byte"], config.training.early_stop)
        progress.stopped_early = progress.best.is_exhausted(config.training.early_stop)
    if config.evaluation.prompts:
        seed = hash((config.run.seed, progress.step)) % 2**63
        texts = evaluation.sample(
            rank.model, rank.tokenizer, config.evaluation, seed=seed, device=rank.device
        )
        for prompt, text in zip(config.evaluation.prompts, texts, strict=True):
            rank.record("sample", step=progress.step, prompt=prompt, text=text)
    return is_best


# ---------------------------------------------------------------------------------------- checkpoints


def _restore(rank: Rank, checkpoint: ray.train.Checkpoint | None) -> Progress:
    """Continue from the run's latest checkpoint, if Ray Train has one."""
    if checkpoint is None:
        return Progress()
    with _on_this_node(checkpoint) as directory:
        state = read_state(directory)
        load_checkpoint(directory, rank.model, rank.optimizer)
    return Progress(
        step=state["step"],
        skipped=state["skipped"],
        # Into a corpus that was changed since, as it may be where the user allows it, they would lead astray.
        cursors=state["cursors"] if is_same_order(state["identity"], rank.task.identity) else None,
        best=evaluation.Best(**state["best"]),
        # As for the driver: a run that need not stop early any more goes on.
        stopped_early=state["stopped_early"] and rank.config.training.early_stop is not None,
    )


@contextlib.contextmanager
def _on_this_node(checkpoint: ray.train.Checkpoint) -> Iterator[str]:
    """A folder with the checkpoint: itself, or one copy for all ranks of a node, until the last has read it.

    With Ray's own `as_directory` a rank that comes later downloads again, over the files that others have mapped.
    """
    if isinstance(checkpoint.filesystem, pyarrow.fs.LocalFileSystem):
        yield checkpoint.path
        return
    context = ray.train.get_context()
    with contextlib.ExitStack() as stack:
        copy = None
        if context.get_local_rank() == 0:
            copy = stack.enter_context(tempfile.TemporaryDirectory(prefix="fusellm_ray_"))
            checkpoint.to_directory(copy)
        copies = gather_json([context.get_node_rank(), copy])
        yield next(path for node, path in copies if node == context.get_node_rank() and path)
        gather_json(None)  # nobody reads any more


def _save(rank: Rank, progress: Progress, writer: CheckpointWriter, *, is_due: bool, is_best: bool) -> None:
    """Copy the state; `writer` brings every rank's part to the run's storage."""
    parts = gather_json(progress.cursors)
    merged = {shard: cursor for part in parts for shard, cursor in part.items()}
    state = {
        "step": progress.step,
        "skipped": progress.skipped,
        "cursors": dict(sorted(merged.items(), key=lambda item: int(item[0]))),
        "best": asdict(progress.best),
        "stopped_early": progress.stopped_early,
        "identity": rank.task.identity,
        "config": rank.config.model_dump(mode="json"),
    }
    writer.save(rank.model, rank.optimizer, state, is_due=is_due, is_best=is_best)

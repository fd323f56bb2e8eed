"""A trainer rank from its start to its end: Ray Train calls `train_loop` on every worker.

    restore or begin → for each step: take the joined batch → forward and backward → step → record → (checkpoint)

All that differs between ranks is which rows they read. Every sum is over all ranks, and every decision (skip, stop,
checkpoint) is taken from such a sum, so ranks never part ways.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from torch.distributed.device_mesh import init_device_mesh

from fusellm_ray.config import Config
from fusellm_ray.corpus.rows import ShardReader
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import ModelError
from fusellm_ray.fusion.loss import ObjectiveOutput, objective
from fusellm_ray.models import HeadedModel, model_facts
from fusellm_ray.stream.client import TeacherAddress, TeacherStream
from fusellm_ray.target.batches import MicroBatch, RankBatches, StepBatch
from fusellm_ray.target.collectives import gather_json, sum_over_ranks
from fusellm_ray.target.checkpoint import load_checkpoint, read_state, write_checkpoint
from fusellm_ray.target.model import (
    build_target,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from fusellm_ray.target.statistics import StepStatistics
from fusellm_ray.target.storage import step_folder


@dataclass(frozen=True)
class TrainTask:
    """What the driver gives to every rank."""

    config: Config
    teachers: tuple[TeacherAddress, ...]
    control: ActorHandle
    identity: dict[str, Any]
    """Fingerprints of models, tokenizers and corpus: saved with every checkpoint."""


@dataclass(slots=True)
class Progress:
    """Where training stands; saved with every checkpoint."""

    step: int = 0
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    cursors: dict[str, Any] | None = None
    """Shard → cursor of its reader, of all ranks; None at the start."""


def train_loop(spec: dict[str, Any]) -> None:
    """Train to the end, or until the driver asks to stop; the last thing done is a checkpoint."""
    task: TrainTask = spec["task"]
    config = task.config
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.trainer.threads)

    mesh = init_device_mesh(device.type, (num_ranks,))
    model = build_target(config.target, mesh)
    optimizer = make_optimizer(model, config.training)
    progress = _restore(model, optimizer)
    if rank == 0:
        task.control.record.remote({"event": "start", "step": progress.step, "ranks": num_ranks})
    batches = _open_batches(task, progress, rank, num_ranks, device)
    saved_step = progress.step
    stop_reason: str | None = None
    answer: ray.ObjectRef | None = None  # of the latest record: the driver's wish, read one step later
    try:
        while progress.step < config.training.steps and stop_reason is None:
            started = time.perf_counter()
            batch = next(batches)
            statistics = StepStatistics(
                [t.name for t in task.teachers], [s.name for s in config.corpus.sources]
            )
            statistics.add_wait(time.perf_counter() - started)
            wish = ray.get(answer) if answer is not None else None
            num_gold, stops = sum_over_ranks([batch.num_gold, wish is not None], device)
            stop_reason = (wish or "another rank asks to stop") if stops else None

            figures = _step(model, optimizer, batch, config, progress, statistics, num_gold, device)
            progress.step += 1
            progress.cursors = batch.cursors
            if rank == 0:
                seconds = time.perf_counter() - started
                figures["perf/tokens_per_s"] = figures["tokens"] / seconds
                figures["time/step_s"] = seconds
                figures["time/wait_share"] = figures["time/wait_s"] / seconds
                record = {"event": "step", "step": progress.step, "steps": config.training.steps} | figures
                answer = task.control.record.remote(record)

            is_last = progress.step == config.training.steps or stop_reason is not None
            if is_last or progress.step - saved_step >= config.checkpoint.every_steps:
                _save(model, optimizer, task, progress, device)
                saved_step = progress.step
    finally:
        batches.close()
    if rank == 0 and answer is not None:
        ray.get(
            task.control.record.remote(
                {"event": "end", "step": progress.step, "reason": stop_reason or "finished"}
            )
        )


def _open_batches(
    task: TrainTask, progress: Progress, rank: int, num_ranks: int, device: torch.device
) -> RankBatches:
    config = task.config
    facts = model_facts(config.target)
    tokenizer = ByteTokenizer.load(
        config.target.model,
        revision=config.target.revision,
        trust_remote_code=config.target.trust_remote_code,
        vocab_size=facts.vocab_size,
    )
    corpus = Corpus.open(config.corpus, config.run.seed)
    num_shards = config.training.batch_rows
    cursors = progress.cursors or {}
    readers = {
        shard: ShardReader(
            corpus, tokenizer, shard, num_shards, config.corpus.row_tokens, cursor=cursors.get(str(shard))
        )
        for shard in range(rank, num_shards, num_ranks)
    }
    stream = None
    if task.teachers:
        stream = TeacherStream(task.teachers, config.stream, facts.vocab_size)
    return RankBatches(
        readers,
        stream,
        config,
        pad_id=tokenizer.eos_id or 0,
        num_micro=math.ceil(math.ceil(num_shards / num_ranks) / config.training.micro_rows),
        device=device,
    )


# ---------------------------------------------------------------------------------------- one step


def _step(
    model: HeadedModel,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    config: Config,
    progress: Progress,
    statistics: StepStatistics,
    num_gold: float,
    device: torch.device,
) -> dict[str, float]:
    # Randomness (LoRA's dropout) depends on run, step and rank alone, so there is no generator state to save.
    torch.manual_seed(hash((config.run.seed, progress.step, dist.get_rank())) % 2**63)
    for micro in batch.micro_batches:
        output = _forward(model, micro, config, denominator=num_gold)
        output.loss.backward()
        statistics.add(micro, output)
    statistics.reduce(device)
    figures = statistics.figures()
    grad_norm = clip_gradients(model, config.training.clip_norm)
    lr = learning_rate(progress.step, config.training)
    set_learning_rate(optimizer, lr)
    figures |= {"grad_norm": grad_norm, "lr": lr}
    if math.isfinite(figures["loss"]) and math.isfinite(grad_norm):
        optimizer.step()
    else:
        progress.skipped += 1
        if progress.skipped > config.training.max_skipped_steps:
            raise ModelError(
                f"step {progress.step + 1}: loss {figures['loss']} and gradient norm {grad_norm} are not finite, for "
                f"the {progress.skipped}th time (training.max_skipped_steps={config.training.max_skipped_steps}); "
                f"this rank's documents: {', '.join(batch.documents[:8])}; lower training.lr or look at them"
            )
    figures["skipped_steps"] = progress.skipped
    optimizer.zero_grad(set_to_none=True)
    return figures


def _forward(model: HeadedModel, batch: MicroBatch, config: Config, *, denominator: float) -> ObjectiveOutput:
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

    loss, clm, fusion, listened = model(batch.input_ids, batch.position_ids, head)
    return ObjectiveOutput(loss=loss, clm=clm, fusion=fusion, listened=listened)


# ---------------------------------------------------------------------------------------- checkpoints


def _restore(model: HeadedModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Continue from the run's latest checkpoint, if Ray Train has one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as directory:
        state = read_state(directory)
        load_checkpoint(directory, model, optimizer)
    return Progress(step=state["step"], skipped=state["skipped"], cursors=state["cursors"])


def _save(
    model: HeadedModel,
    optimizer: torch.optim.Optimizer,
    task: TrainTask,
    progress: Progress,
    device: torch.device,
) -> None:
    """Each rank writes its part; Ray Train brings the parts together in the run's storage."""
    parts = gather_json(progress.cursors, device)
    merged = {shard: cursor for part in parts for shard, cursor in part.items()}
    state = {
        "step": progress.step,
        "skipped": progress.skipped,
        "cursors": dict(sorted(merged.items(), key=lambda item: int(item[0]))),
        "identity": task.identity,
        "config": task.config.model_dump(mode="json"),
    }
    with tempfile.TemporaryDirectory(prefix="fusellm_ray_") as directory:
        write_checkpoint(directory, model, optimizer, state)
        ray.train.report(
            {"step": progress.step},
            checkpoint=ray.train.Checkpoint.from_directory(directory),
            checkpoint_dir_name=step_folder(progress.step),
        )

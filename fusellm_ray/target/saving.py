"""Checkpoints on their way to the run's storage, while the ranks train on.

    training thread   wait for the write before, copy the state to the CPU's memory ─┐
    writing thread    safetensors in a temporary folder → the run's storage, complete or not at all ◀┘

Ranks agree over a process group of this module's own, so that writing never mixes with training's collectives.
One state at a time is on its way: a rank holds at most one copy of its shards.

    STORAGE/NAME/step_00000200/   what a run resumes from; Ray Train knows it, and keeps the latest
    STORAGE/NAME/best_00000150/   the model with the best evaluation so far, without the optimiser; the latest counts
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from fusellm_ray.errors import CheckpointError
from fusellm_ray.models import HeadedModel
from fusellm_ray.target.checkpoint import STATE_FILE, model_part, training_tensors, write_checkpoint
from fusellm_ray.target.collectives import gather_json
from fusellm_ray.target.storage import best_folder, best_folders, step_folder

Publish = Callable[[Path, int], None]
"""Bring one rank's files of a step from a folder to the run's storage; every rank calls it."""


class CheckpointWriter:
    """A rank's writing thread. Every rank must make one, and ask it for the same.

    Args:
        on_written: told step and seconds of every finished write, on the writing thread.
        report: where what a run resumes from goes; default: to Ray Train.
        report_best: where the best model goes; default: beside it.
    """

    def __init__(
        self,
        on_written: Callable[[int, float], object],
        *,
        report: Publish | None = None,
        report_best: Publish | None = None,
    ) -> None:
        self._group = dist.new_group(backend="gloo")
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._on_written = on_written
        self._report = report or _report
        self._report_best = report_best or self._publish_best
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def save(
        self,
        model: HeadedModel,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        is_due: bool,
        is_best: bool,
    ) -> None:
        """Copy the training state and return; it is written meanwhile.

        Args:
            state: goes into state.json; its `step` names the checkpoint.
            is_due: write what a run resumes from.
            is_best: write the model as the best so far.

        Raises:
            CheckpointError: the write before failed.
        """
        self.wait()
        live = training_tensors(model, optimizer)
        copy: Any = self._stager.stage(live if is_due else model_part(live))
        self._thread = threading.Thread(
            target=self._write, args=(copy, state, is_due, is_best), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise the CheckpointError of a write that failed."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: it could not be.
        """
        if self._thread is not None:
            self._thread.join()
        self.check()

    def _write(
        self, tensors: dict[str, Tensor], state: Mapping[str, Any], is_due: bool, is_best: bool
    ) -> None:
        step, started = state["step"], time.monotonic()
        try:
            if is_best:
                self._write_one(model_part(tensors), state, self._report_best)
            if is_due:
                self._write_one(tensors, state, self._report)
            self._on_written(step, time.monotonic() - started)
        except CheckpointError as error:
            self._error = error
        except Exception as error:  # whatever storage raises
            self._error = CheckpointError(
                f"the checkpoint of step {step} cannot be written to run.storage "
                f"({type(error).__name__}: {error}); see that it can be reached and has room"
            )

    def _write_one(self, tensors: dict[str, Tensor], state: Mapping[str, Any], publish: Publish) -> None:
        with tempfile.TemporaryDirectory(prefix="fusellm_ray_") as directory:
            write_checkpoint(directory, tensors, state, group=self._group)
            publish(Path(directory), state["step"])

    def _publish_best(self, directory: Path, step: int) -> None:
        storage = ray.train.get_context().get_storage()
        publish_best(directory, step, storage.storage_filesystem, storage.experiment_fs_path, self._group)


def _report(directory: Path, step: int) -> None:
    ray.train.report(
        {"step": step},
        checkpoint=ray.train.Checkpoint.from_directory(directory),
        checkpoint_dir_name=step_folder(step),
    )


def publish_best(
    directory: Path, step: int, filesystem: pyarrow.fs.FileSystem, root: str, group: dist.ProcessGroup
) -> None:
    """Bring every rank's files to a new ROOT/best_STEP; state.json last, and only then are earlier ones removed.

    Whatever lies there already may be the only complete best model, even of this step: it is not written over.
    """
    old: list[tuple[int, int]] = []
    attempt = 0
    if dist.get_rank() == 0:
        entries = filesystem.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True))
        old = best_folders(entry.base_name for entry in entries)
        attempt = max((taken + 1 for of_step, taken in old if of_step == step), default=0)
        filesystem.create_dir(f"{root}/{best_folder(step, attempt)}")
    attempt = gather_json(attempt, group=group)[0]
    folder = f"{root}/{best_folder(step, attempt)}"
    for path in sorted(directory.glob("*.safetensors")):
        pyarrow.fs.copy_files(str(path), f"{folder}/{path.name}", destination_filesystem=filesystem)
    gather_json(None, group=group)
    if dist.get_rank() == 0:
        pyarrow.fs.copy_files(
            str(directory / STATE_FILE), f"{folder}/{STATE_FILE}", destination_filesystem=filesystem
        )
        for earlier in old:
            filesystem.delete_dir(f"{root}/{best_folder(*earlier)}")

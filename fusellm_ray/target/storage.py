"""Where a run's checkpoints lie: a folder, or an object store, as Ray Train writes it.

STORAGE/NAME/step_00000200/{state.json, *.safetensors, …}
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs

from fusellm_ray.errors import CheckpointError
from fusellm_ray.target.checkpoint import STATE_FILE

STEP_FOLDER = re.compile(r"step_(\d{8,})$")


def step_folder(step: int) -> str:
    """Name of a checkpoint's folder: sorts by step."""
    return f"step_{step:08d}"


class Checkpoints:
    """The finished checkpoints of one run.

    Args:
        storage: folder or URI (s3://…, gs://…).
        name: the run's name.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.storage = storage if "://" in storage else str(Path(storage).expanduser().resolve())
        try:
            self._filesystem, root = pyarrow.fs.FileSystem.from_uri(self.storage)
        except Exception as error:
            raise CheckpointError(
                f"run.storage={storage!r} cannot be opened ({error}); give a folder or a URI such as s3://bucket/runs"
            ) from error
        self._root = f"{root.rstrip('/')}/{name}"
        self.folder = f"{self.storage.rstrip('/')}/{name}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending: those whose state.json, written last, is there."""
        entries = self._filesystem.get_file_info(pyarrow.fs.FileSelector(self._root, allow_not_found=True))
        folders = {
            int(match[1]): entry.path for entry in entries if (match := STEP_FOLDER.search(entry.path))
        }
        complete = self._filesystem.get_file_info([f"{path}/{STATE_FILE}" for path in folders.values()])
        is_file = pyarrow.fs.FileType.File
        return sorted(step for step, info in zip(folders, complete, strict=True) if info.type == is_file)

    def latest_state(self) -> dict[str, Any] | None:
        """state.json of the latest checkpoint; None where there is no checkpoint."""
        steps = self.steps()
        if not steps:
            return None
        path = f"{self._root}/{step_folder(steps[-1])}/{STATE_FILE}"
        with self._filesystem.open_input_stream(path) as stream:
            return json.loads(stream.read())

    @contextlib.contextmanager
    def local_copy(self, step: int | None = None) -> Iterator[Path]:
        """A checkpoint as a local folder: itself on a local disk, a temporary copy from an object store.

        Raises:
            CheckpointError: there is no checkpoint, or none of that step.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"step {step}"
            raise CheckpointError(f"{self.folder}: no {wanted}; complete checkpoints: {steps or 'none'}")
        path = f"{self._root}/{step_folder(steps[-1] if step is None else step)}"
        if isinstance(self._filesystem, pyarrow.fs.LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory() as directory:
            pyarrow.fs.copy_files(path, directory, source_filesystem=self._filesystem)
            yield Path(directory)

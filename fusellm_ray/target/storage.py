"""Where a run's checkpoints lie: a folder, or an object store, as Ray Train writes it.

STORAGE/NAME/step_00000200/{state.json, *.safetensors, …}
STORAGE/NAME/best_00000150/   the same without the optimiser's state, where checkpoint.keep_best asks for it;
                              best_00000150_1 where a restart found that name taken
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs

from fusellm_ray.errors import CheckpointError
from fusellm_ray.folders import absolute, below
from fusellm_ray.target.checkpoint import STATE_FILE, require_format

STEP_FOLDER = re.compile(r"step_(\d{8,})")
BEST_FOLDER = re.compile(r"best_(\d{8,})(?:_(\d+))?")


def step_folder(step: int) -> str:
    """Name of a checkpoint's folder: sorts by step."""
    return f"step_{step:08d}"


def best_folder(step: int, attempt: int = 0) -> str:
    """Name of the folder of the best model so far; `attempt` counts those of the same step before it."""
    return f"best_{step:08d}" + (f"_{attempt}" if attempt else "")


def best_folders(names: Iterable[str]) -> list[tuple[int, int]]:
    """Step and attempt of the best models' folders among `names`, ascending: the last complete one counts."""
    matches = (BEST_FOLDER.fullmatch(name) for name in names)
    return sorted((int(match[1]), int(match[2] or 0)) for match in matches if match)


class Checkpoints:
    """The finished checkpoints of one run.

    Args:
        storage: folder or URI (s3://…, gs://…).
        name: the run's name.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.storage = absolute(storage)
        try:
            self._filesystem, root = pyarrow.fs.FileSystem.from_uri(self.storage)
        except Exception as error:
            raise CheckpointError(
                f"run.storage={storage!r} cannot be opened ({error}); give a folder or a URI such as s3://bucket/runs"
            ) from error
        self._root = f"{root.rstrip('/')}/{name}"
        self.folder = below(self.storage, name)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending: those with every file that their state.json names."""
        return [step for step in self._folders() if self._complete_state(step_folder(step)) is not None]

    def latest_state(self) -> dict[str, Any] | None:
        """state.json of the latest complete checkpoint; None where there is none.

        Raises:
            CheckpointError: another version of this package wrote it.
        """
        for step in reversed(self._folders()):
            state = self._complete_state(step_folder(step))
            if state is not None:
                require_format(state, below(self.folder, f"{step_folder(step)}/{STATE_FILE}"))
                return state
        return None

    @contextlib.contextmanager
    def local_copy(self, step: int | Literal["best"] | None = None) -> Iterator[Path]:
        """A complete checkpoint as a local folder: itself on a local disk, else a temporary copy.

        Args:
            step: default: the latest; `best`: the model with the best evaluation, without the optimiser's state.

        Raises:
            CheckpointError: there is no complete checkpoint, or none of that step.
        """
        path = f"{self._root}/{self._best() if step == 'best' else step_folder(self._one_of(step))}"
        if isinstance(self._filesystem, pyarrow.fs.LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="fusellm_ray_") as directory:
            with self._reading():
                pyarrow.fs.copy_files(path, directory, source_filesystem=self._filesystem)
            yield Path(directory)

    def read_text(self, name: str) -> str | None:
        """A file of the run's folder, None if there is none; bytes that are no text are replaced."""
        path = f"{self._root}/{name}"
        with self._reading():
            if self._filesystem.get_file_info(path).type != pyarrow.fs.FileType.File:
                return None
            with self._filesystem.open_input_stream(path) as stream:
                return bytes(stream.read()).decode(errors="replace")

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run's folder anew.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            with self._filesystem.open_output_stream(f"{self._root}/{name}") as stream:
                stream.write(text.encode())
        except OSError as error:
            raise CheckpointError(f"{self.folder}/{name}: cannot be written ({error})") from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot be read ({error}); see that run.storage can be reached from here, with "
                "credentials in the environment that may read it"
            ) from error

    def _entries(self, folder: str) -> list[pyarrow.fs.FileInfo]:
        """What lies in a folder; nothing, if there is none."""
        with self._reading():
            return self._filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))

    def _one_of(self, step: int | None) -> int:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"step {step}"
            raise CheckpointError(f"{self.folder}: no {wanted}; complete checkpoints: {steps or 'none'}")
        return steps[-1] if step is None else step

    def _best(self) -> str:
        names = (entry.base_name for entry in self._entries(self._root))
        for step, attempt in reversed(best_folders(names)):
            if self._complete_state(name := best_folder(step, attempt)) is not None:
                return name
        raise CheckpointError(
            f"{self.folder}: no best model was kept; set checkpoint.keep_best and evaluation.every_steps before "
            "training, or export a step"
        )

    def _folders(self) -> list[int]:
        """Steps that have a folder, ascending."""
        matches = (STEP_FOLDER.fullmatch(entry.base_name) for entry in self._entries(self._root))
        return sorted(int(match[1]) for match in matches if match)

    def _complete_state(self, name: str) -> dict[str, Any] | None:
        """state.json of a checkpoint's folder, None unless it is there and so is, in its size, every file it names.

        Ray copies the ranks' files side by side, in any order: state.json may be there before the others are.
        """
        folder = f"{self._root}/{name}"
        sizes = {entry.base_name: entry.size for entry in self._entries(folder) if entry.is_file}
        if STATE_FILE not in sizes:
            return None
        try:
            with self._filesystem.open_input_stream(f"{folder}/{STATE_FILE}") as stream:
                state = json.loads(stream.read())
        except (OSError, ValueError):  # gone since, or half of it has been copied
            return None
        files = state.get("files") if isinstance(state, dict) else None
        if not isinstance(files, dict) or any(sizes.get(name) != size for name, size in files.items()):
            return None
        return state

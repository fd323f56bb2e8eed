"""Ray Train's own list of a run's checkpoints, kept true to those that are there.

Ray resumes from what `checkpoint_manager_snapshot.json` in the run's folder names. It refuses to start if one of those
folders is gone, takes one that lost a file for whole, and writes the list in place: a kill may leave half of it. A run
resumes from its complete checkpoints, whatever became of the list.
"""

from __future__ import annotations

import json

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

from fusellm_ray.target.storage import Checkpoints, step_folder

SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"


def restore_snapshot(checkpoints: Checkpoints) -> list[str]:
    """Write the list anew if it does not name the run's complete checkpoints, and these alone.

    Returns:
        Names of listed checkpoints that are damaged or gone.

    Raises:
        CheckpointError: the storage cannot be read or written.
    """
    steps = checkpoints.steps()
    names = [step_folder(step) for step in steps]
    text = checkpoints.read_text(SNAPSHOT_FILE)
    listed = _listed(text)
    is_new = text is None and not names
    if is_new or listed == (names, names[-1] if names else None):
        return []
    results = [
        _TrainingResultState(checkpoint_dir_name=name, metrics={"step": step})
        for name, step in zip(names, steps, strict=True)
    ]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(results))),
        latest_checkpoint_result=results[-1] if results else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    checkpoints.write_text(SNAPSHOT_FILE, state.json())
    return [name for name in listed[0] if name not in names] if listed else []


def _listed(text: str | None) -> tuple[list[str], str | None] | None:
    """Names of the listed folders, and of the one to resume from; None where this is no list."""
    try:
        tree = json.loads(text or "")
        latest = tree["latest_checkpoint_result"]
        names = [result["checkpoint_dir_name"] for result in tree["checkpoint_results"]]
        return names, None if latest is None else latest["checkpoint_dir_name"]
    except (ValueError, KeyError, TypeError):
        return None

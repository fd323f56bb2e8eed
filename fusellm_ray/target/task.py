"""What a driver hands to Ray Train. Its controller reads all of this and needs none of a rank's imports: seconds of
every start, so they wait until a rank is at work.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.train
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from fusellm_ray.config import Config
from fusellm_ray.errors import TeacherLostError
from fusellm_ray.observe.failures import find_error
from fusellm_ray.stream.address import TeacherAddress


@dataclass(frozen=True)
class TrainTask:
    """What the driver gives to every rank."""

    config: Config
    teachers: tuple[TeacherAddress, ...]
    control: ActorHandle
    identity: dict[str, Any]
    """Fingerprints of models, tokenizers and corpus: saved with every checkpoint."""


def run_rank(spec: dict[str, Any]) -> None:
    """Be a rank; `spec` holds the `task`."""
    from fusellm_ray.target.worker import train_loop

    _say_name(f"rank {ray.train.get_context().get_world_rank()}")
    train_loop(spec["task"])


def _say_name(name: str) -> None:
    """Have Ray put it in front of this process's log lines, as it does with the `repr` of actors that are ours."""
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"{ray_constants.LOG_PREFIX_ACTOR_NAME}{name}\n")
        stream.flush()


class RaiseLastingErrors(ray.train.UserCallback):
    """Ends the run on errors that a restart of the worker group cannot heal."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            ours = find_error(error)
            if isinstance(ours, ValueError | TeacherLostError):
                raise ours


class NameController(ControllerCallback):
    """Tells the driver which process Ray Train's controller is, so that it can see to its end."""

    def __init__(self, control: ActorHandle) -> None:
        self._control = control

    def after_controller_start(self, train_run_context: Any) -> None:
        me = psutil.Process()
        ray.get(self._control.note_controller.remote(me.pid, me.create_time()))


class NoDatasets(WorkerGroupCallback):
    """In place of Ray Data's callback, whose process would idle beside ranks that read their corpus themselves."""

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        return {"dataset_shard_provider": [None] * len(workers)}


class FixedPlaces(FixedScalingPolicy):
    """A group of fixed size where no node can come: asks no autoscaler for its places, which takes a process."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask for nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing was asked for."""

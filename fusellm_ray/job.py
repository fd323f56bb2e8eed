"""The driver of a run: validate, start, show progress, stop everything it started.

    main thread     signals, progress, the teachers' pools
    fit thread      ray.train TorchTrainer.fit(): the worker group, its restarts and checkpoints
    disk watch      does a node that came since write objects to disk?

The first SIGINT or SIGTERM asks the ranks to save and end; a second one ends the run at once. Either way
nothing that was started here outlives the call.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import psutil
import ray
import ray.train
import ray.train.torch
from ray._private import parameter, ray_constants, services
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fusellm_ray import plan
from fusellm_ray.cluster import cluster_address
from fusellm_ray.config import Config
from fusellm_ray.errors import CheckpointError, ClusterError, ConfigError, FuseLLMError
from fusellm_ray.observe.failures import find_error, group_failures
from fusellm_ray.observe.losses import TeacherLosses
from fusellm_ray.observe.progress import Display, make_display
from fusellm_ray.observe.records import RecordLog
from fusellm_ray.observe.sinks import Sinks
from fusellm_ray.stream.address import TeacherAddress
from fusellm_ray.stream.memory import NO_DISK_ENVIRONMENT, DiskWatch
from fusellm_ray.target.checkpoint import export_model, is_same_order
from fusellm_ray.target.control import RunControl
from fusellm_ray.target.snapshot import restore_snapshot
from fusellm_ray.target.storage import Checkpoints
from fusellm_ray.target.task import (
    FixedPlaces,
    NameController,
    NoDatasets,
    RaiseLastingErrors,
    TrainTask,
    run_rank,
)
from fusellm_ray.teachers.attach import attach, join_cluster, running_cluster
from fusellm_ray.teachers.service import (
    SLOW_START_S,
    PoolWatch,
    refuse_other_teachers,
    start_pools,
    stop_pools,
    wait_ready,
)

JOB_STOP_WAIT_S = 60
"""What `ray job stop` should give a run for its checkpoint; Ray's default is 3."""
COLLECTIVE_S = 1800
"""How long a rank waits for the others in a collective, at least; torch's default."""
POLL_S = 0.5
"""How often the driver looks for new records."""
ELASTIC_PLACEMENT_S = 30.0
"""After so long without a place an elastic group gets another size: Ray looks every 20 s which nodes there are, and
may have counted one that is gone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    step: int
    """Optimiser steps that are saved."""
    is_finished: bool
    """False after a requested stop: the same command goes on from here."""
    stop_requested: bool = False
    """It was asked to stop, perhaps too late to end before its last step: nothing else should begin."""


def run_job(
    config: Config,
    *,
    allow_changes: bool = False,
    display: Display | None = None,
    pools: dict[str, Any] | None = None,
    attached: bool = False,
) -> Outcome:
    """Run or resume a training run to its end, or to a requested stop.

    Args:
        config: the run.
        allow_changes: resume even if models, tokenizers or corpus changed since the checkpoint; a changed corpus is
            read from its beginning.
        display: where progress goes; default: bars on a terminal, a line a step elsewhere.
        pools: teachers that are up already, by name; they are left running.
        attached: use the teachers that `teachers up` started on the cluster; they are left running.

    Raises:
        FuseLLMError: with the cause, after everything started here has been stopped.
    """
    display = display or make_display()
    checkpoints = Checkpoints(config.run.storage, config.run.name)
    saved = checkpoints.latest_state()
    identity = plan.preflight(config)
    if saved is not None:
        changes = plan.changes_since(saved, identity, allow=allow_changes, folder=checkpoints.folder)
        for change in changes:
            display.note(f"changed since step {saved['step']}: {change}")
        if is_finished(saved, config):
            display.note(f"{config.run.name}: finished at step {saved['step']} ({checkpoints.folder})")
            return Outcome(step=saved["step"], is_finished=True)
        if not is_same_order(saved["identity"], identity):
            display.note(
                "the checkpoint's place in the corpus means nothing in this one: read from its beginning"
            )
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_recorded(config, checkpoints))
        # In this order: ray.init puts handlers of its own over those it finds.
        stack.enter_context(running_cluster() if attached else local_or_running_cluster(config))
        stop = stack.enter_context(_Stop())
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # set by Ray in the entrypoint of a job
            wait_s = int(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))
            if wait_s < JOB_STOP_WAIT_S:
                display.note(
                    f"`ray job stop` will kill this job after {wait_s} s, checkpoint or not; set "
                    "RAY_JOB_STOP_WAIT_TIME_S=120 in the job's runtime environment"
                )
        missing = plan.require_resources(config, has_teachers=attached or pools is not None)
        if missing:
            display.note(
                f"the cluster must grow first ({missing}); "
                f"giving up after {config.run.start_timeout_s:.0f} s (run.start_timeout_s)"
            )
        for note in plan.unused_gpus(config):
            display.note(note)
        own_pools: dict[str, Any] = {}
        try:
            if attached:
                pools = attach(config)
            if pools is None:
                pools = own_pools = start_pools(config)
            with places_for_ranks(config) if missing else contextlib.nullcontext():
                descriptions = wait_ready(pools, config.run.start_timeout_s, display)
            refuse_other_teachers(descriptions, identity["teachers"])
            disk = stack.enter_context(contextlib.closing(DiskWatch(refuse=not config.stream.allow_spilling)))
            addresses = tuple(
                TeacherAddress(
                    name=t.name,
                    fingerprint=descriptions[t.name].fingerprint,
                    top_k=t.top_k,
                    pool=pools[t.name],
                    run=checkpoints.folder,
                    is_shared=not own_pools,
                )
                for t in config.active_teachers
            )
            task = TrainTask(config=config, teachers=addresses, control=_start_control(), identity=identity)
            return _fit(task, checkpoints, display, log, stop, disk)
        except KeyboardInterrupt:
            for supervisor in set(own_pools.values()):
                ray.kill(supervisor)  # replicas go with it
            own_pools = {}
            raise
        finally:
            stop.is_over = True
            stop_pools(own_pools)


@contextlib.contextmanager
def _recorded(config: Config, checkpoints: Checkpoints) -> Iterator[RecordLog]:
    """The run's record, which says how the run began, and why it failed, however early."""
    with RecordLog(checkpoints.folder) as log:
        log.write({"event": "run", "config": config.model_dump(mode="json")})
        try:
            yield log
        except (Exception, KeyboardInterrupt) as error:
            is_interrupted = isinstance(error, KeyboardInterrupt)
            text = "interrupted; the same command goes on from the latest checkpoint"
            log.write({"event": "failed", "error": text if is_interrupted else str(error)})
            raise


def is_finished(state: dict[str, Any], config: Config) -> bool:
    """Whether a run's latest checkpoint is its last: all steps are done, or it stopped early, as it still should."""
    has_stopped = config.training.early_stop is not None and state.get("stopped_early", False)
    return has_stopped or state["step"] >= config.training.steps


def export_run(config: Config, out: Path, *, step: int | Literal["best"] | None = None) -> Path:
    """Write a checkpoint of the run as a Hugging Face folder; see `Checkpoints.local_copy`."""
    checkpoints = Checkpoints(config.run.storage, config.run.name)
    with checkpoints.local_copy(step) as directory:
        return export_model(directory, config.target, out)


# ---------------------------------------------------------------------------------------- cluster


_ONE_NODE_ENVIRONMENT = {
    # What nobody reads where there is no dashboard, and every idle process pays for:
    "RAY_event_stats": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that asks whether this one node is taken away
    # How often the raylet looks after what changes once in a run here, ten times a second by default:
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_kill_idle_workers_interval_ms": "1000",
}


@contextlib.contextmanager
def local_or_running_cluster(config: Config) -> Iterator[None]:
    """The cluster RAY_ADDRESS names (set inside `ray job submit`), or a private one on this machine."""
    if ray.is_initialized():
        yield
        return
    address = cluster_address()
    if address:
        join_cluster(address)
    else:
        store = max(4 * config.stream.in_flight_bytes * config.trainer.workers.max, 256 << 20)
        try:
            start_private_ray(object_store_memory=store)
        except ValueError as error:
            raise ClusterError(
                f"Ray does not start with an object store of {store:,} bytes, four times stream.in_flight_bytes × "
                f"trainer.workers: {error}"
            ) from error
    try:
        yield
    finally:
        if address:
            ray.shutdown()
        else:
            stop_private_ray()


def start_private_ray(**options: Any) -> None:
    """Start a Ray of this process's own that listens on the loopback alone and keeps the stream in memory.

    Args:
        options: of `ray.init`.
    """
    for name, value in (NO_DISK_ENVIRONMENT | _ONE_NODE_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    with (
        # Ray listens on all interfaces unless it takes clusters to end at this machine, as it does on some systems.
        _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),
        _replaced(parameter, "RayParams", _OneNodeParams),
        # Started even for no dashboard; `ray.init` waits for it.
        _replaced(services, "start_api_server", lambda *_args, **_options: (None, None)),
    ):
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)


def stop_private_ray() -> None:
    """End what `start_private_ray` started, and make sure of it."""
    processes = _ray_processes()
    try:
        ray.shutdown()
    finally:
        _end(processes)


class _OneNodeParams(parameter.RayParams):
    """Without two processes: one follows logs for drivers that show them, one asks whether nodes should come."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, include_log_monitor=False, no_monitor=True)  # type: ignore[arg-type]


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)


@contextlib.contextmanager
def places_for_ranks(config: Config) -> Iterator[None]:
    """Ask for the ranks' places, until Ray Train does: an autoscaler then brings their nodes while teachers load.

    Only for clusters that must grow: on others teachers, which may need a node to themselves, should choose first.
    """
    amounts = plan.rank_resources(config)
    group = placement_group([amounts] * config.trainer.workers.min) if amounts else None
    try:
        yield
    finally:
        if group is not None:
            remove_placement_group(group)


def _ray_processes() -> list[psutil.Process]:
    """The processes of the private cluster that this one started."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() in ("raylet", "gcs_server"):
                found += [child, *child.children(recursive=True)]
    return found


def _still(pid: int, created: float) -> list[psutil.Process]:
    """The process of this id that was created then, unless it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process] if process.create_time() == created else []
    return []


def _end(processes: list[psutil.Process]) -> None:
    """Make sure of the end: a Ray worker was seen to hang in its exit after it had left its raylet."""
    _, left = psutil.wait_procs(processes, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


class _Stop:
    """Turns SIGINT and SIGTERM into a wish while ranks train; before, and the second time, it interrupts."""

    def __init__(self) -> None:
        self.can_wait = False
        """Ranks are up: there is something to save."""
        self.is_over = False
        """Everything is being stopped already."""
        self.reason: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.is_over:
            return
        if self.reason is not None or not self.can_wait:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


# ---------------------------------------------------------------------------------------- training


class _Trainer(ray.train.torch.TorchTrainer):
    """Without the processes of Ray Train's that would idle beside a run."""

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if not cluster_address():
            # It frees the ranks' places if the controller is killed; a private Ray ends with the run.
            unused += (PlacementGroupCleanerCallback,)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # Ray's annotation is of V1
        kept = [callback for callback in callbacks if not isinstance(callback, unused)]
        return [*kept, NoDatasets()]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if not cluster_address() and isinstance(settings["scaling_policy"], FixedScalingPolicy):
            settings["scaling_policy"] = FixedPlaces(settings["scaling_policy"].scaling_config)
        return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]  # Ray's annotation is of V1


def _start_control() -> Any:
    """The actor between this driver and the ranks, on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(RunControl).options(num_cpus=0, scheduling_strategy=here).remote()


def _make_trainer(task: TrainTask, storage: str) -> _Trainer:
    """Ray Train, set to this run's patience by its environment, too."""
    config = task.config
    # Workers keep the job's working directory, so that relative paths mean the same everywhere.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    placement_s = config.run.start_timeout_s
    if config.trainer.workers.is_elastic:
        placement_s = min(placement_s, ELASTIC_PLACEMENT_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(placement_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    workers = config.trainer.workers
    return _Trainer(
        run_rank,
        train_loop_config={"task": task},
        # A rank that waits for a teacher keeps the others in a collective: the stream's deadline must come first.
        torch_config=ray.train.torch.TorchConfig(
            timeout_s=max(COLLECTIVE_S, round(config.stream.deadline_s) + 300)
        ),
        scaling_config=ScalingConfig(
            # Ray's annotation is of V1, which knows no range.
            num_workers=(workers.min, workers.max) if workers.is_elastic else workers.max,  # type: ignore[arg-type]
            use_gpu=config.trainer.use_gpu,
            resources_per_worker=config.trainer.resources_per_worker or None,
        ),
        run_config=RayRunConfig(
            name=config.run.name,
            storage_path=storage,
            # Ray's default for a group that cannot be placed is to try for ever.
            failure_config=FailureConfig(  # type: ignore[call-arg]  # Ray's annotation is of V1
                max_failures=config.trainer.max_failures,
                controller_failure_limit=round(_patience_s(config) / placement_s) - 1,
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.checkpoint.keep),
            callbacks=[RaiseLastingErrors(), NameController(task.control)],  # type: ignore[list-item]  # annotated for V1
        ),
    )


def _fit(
    task: TrainTask, checkpoints: Checkpoints, display: Display, log: RecordLog, stop: _Stop, disk: DiskWatch
) -> Outcome:
    """Train to the end of the run; meanwhile bring records and wishes from one side to the other."""
    config = task.config
    control: Any = task.control  # Ray's handles have no types
    lost = restore_snapshot(checkpoints)
    if lost:
        steps = checkpoints.steps()
        where = f"from step {steps[-1]}" if steps else "from the beginning"
        display.note(f"{', '.join(lost)} in {checkpoints.folder}: damaged or gone; going on {where}")
    trainer = _make_trainer(task, checkpoints.storage)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    settings = config.model_dump(mode="json")
    sinks = Sinks(config.run.sinks, checkpoints.folder, settings, on_problem=display.note)
    watch = PoolWatch({teacher.name: teacher.pool for teacher in task.teachers})
    losses = TeacherLosses([teacher.name for teacher in task.teachers])
    with contextlib.suppress(ConfigError):  # a damaged record is no reason not to train
        for record in log.so_far():
            losses.notes(record)
    asked_to_stop = False
    started = time.monotonic()
    has_said_so = False
    thread.start()
    with display, sinks:
        while True:
            thread.join(POLL_S)
            running = thread.is_alive()
            if stop.reason is not None and not asked_to_stop:
                asked_to_stop = True
                display.note(f"{stop.reason}: saving a checkpoint, then stopping; once more stops at once")
                control.request_stop.remote(stop.reason)
            try:
                records, num_dropped = ray.get(control.take.remote())
            except RayError as error:
                raise ClusterError(f"the run's control actor on this node is gone: {error}") from error
            disk.poll()
            stop.can_wait = stop.can_wait or bool(records)
            if not stop.can_wait and not has_said_so and time.monotonic() - started > SLOW_START_S:
                has_said_so = True
                display.note(
                    f"ranks are not up yet ({plan.describe_demand(config)}); giving up after "
                    f"{_patience_s(config):.0f} s (run.start_timeout_s × (1 + trainer.max_failures))"
                )
            if num_dropped:
                display.note(f"{num_dropped} records were dropped before this driver could read them")
            for record in records:
                notes = losses.notes(record)
                if record["event"] == "end":
                    record["spilled_bytes"] = disk.count()
                    record |= {"dropped_tokens": losses.dropped_tokens} if losses.dropped_tokens else {}
                log.write(record)
                sinks.write(record)
                display.show(record)
                for note in notes:
                    display.note(note)
            states = watch.poll()
            if states:
                log.write({"event": "teachers", "pools": states})
            if not running:
                break
        controller = ray.get(control.controller.remote())
        ray.kill(control)
        if controller is not None:
            _end(_still(*controller))
        if failure:
            raise explain_failure(failure[0], config) from failure[0]
    state = checkpoints.latest_state()
    if state is None and stop.reason is not None:
        return Outcome(0, is_finished=False, stop_requested=True)  # before the first step
    if state is None:
        raise CheckpointError(f"{checkpoints.folder}: the run ended without a checkpoint; see Ray's logs")
    return Outcome(state["step"], is_finished(state, config), stop_requested=stop.reason is not None)


def explain_failure(error: BaseException, config: Config) -> FuseLLMError:
    """What `TorchTrainer.fit` raised, as an error of ours."""
    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return ClusterError(
            f"the ranks could not be placed within {_patience_s(config):.0f} s: "
            f"{plan.describe_demand(config)}; free resources, let the cluster grow, or lower trainer.workers"
        )
    ours = find_error(error)
    if ours is not None:
        return ours
    if isinstance(error, TrainingFailedError):
        text = group_failures(getattr(error, "worker_failures", {}))
        return ClusterError(
            f"the worker group failed more often than trainer.max_failures={config.trainer.max_failures} allows\n"
            f"{text or error}"
        )
    return ClusterError(f"training ended with {type(error).__name__}: {error}")


def _patience_s(config: Config) -> float:
    """How long Ray Train tries to place the worker group."""
    return config.run.start_timeout_s * (1 + config.trainer.max_failures)

"""Teachers that outlive a run: supervisors, one a teacher, as named, detached actors of the cluster of RAY_ADDRESS.

fusellm-ray teachers up CONFIG          start them, wait until they are ready, leave
fusellm-ray train CONFIG --attach       several runs, each with the same teachers
fusellm-ray teachers status | down CONFIG
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from fusellm_ray.cluster import cluster_address
from fusellm_ray.config import Config, TeacherConfig
from fusellm_ray.errors import ClusterError, ConfigError, FuseLLMError
from fusellm_ray.observe.progress import Display
from fusellm_ray.stream.failures import cause_of, summary_of
from fusellm_ray.teachers.identity import answer_settings, differences
from fusellm_ray.teachers.report import Description, PoolStatus
from fusellm_ray.teachers.service import (
    get_status,
    refuse_other_teachers,
    stop_pools,
    supervise,
    wait_ready,
)

NAMESPACE = "fusellm_ray"
_ANSWER_S = 10.0
"""Given to a pool to say how it stands."""
_CONNECT_S = 10.0
"""Given to a cluster to take a connection; Ray itself tries for a quarter of an hour."""
_GONE_S = 30.0
"""Given to processes that were told to end."""


@contextlib.contextmanager
def running_cluster() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names.

    Raises:
        ConfigError: there is none; teachers on a private one would end with this process.
    """
    address = cluster_address()
    if address is None:
        raise ConfigError(
            "RAY_ADDRESS names no cluster: teachers that outlive a run need one that does, too; start one "
            "(ray start --head) and set RAY_ADDRESS, or use `fusellm-ray train` without --attach"
        )
    if ray.is_initialized():
        yield
        return
    join_cluster(address)
    try:
        yield
    finally:
        ray.shutdown()


def join_cluster(address: str) -> str:
    """Become a driver of a running cluster; returns its dashboard's HOST:PORT, or nothing.

    Raises:
        ClusterError: it does not answer, or not to this process.
    """
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "/" not in host:  # else auto, ray://… or an error of Ray's
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        return ray.init(address=address, log_to_driver=False).dashboard_url or ""
    except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"RAY_ADDRESS={address}: there is no cluster to join: {error}") from error


def bring_up(
    config: Config,
    identities: Mapping[str, Mapping[str, Any]],
    display: Display | None = None,
) -> dict[str, Description]:
    """Start the config's teachers, those that run already excepted, and wait until all are ready.

    Args:
        identities: what each teacher should be; see `service.refuse_other_teachers`.
        display: where progress goes.

    Raises:
        ConfigError: one of these names runs with other settings, or the config has no teachers.
        FuseLLMError: a teacher does not come up; what was started here is stopped again.
    """
    if not config.active_teachers:
        raise ConfigError(f"fusion.rule={config.fusion.rule}: this config listens to no teacher")
    pools = {teacher.name: find_pool(teacher.name) for teacher in config.active_teachers}
    _refuse_what_does_not_fit(config, {name: pool for name, pool in pools.items() if pool is not None})
    started: dict[str, Any] = {}
    try:
        for teacher in config.active_teachers:
            if pools[teacher.name] is None:
                started[teacher.name] = _supervise_detached(config, teacher)
        descriptions = wait_ready(pools | started, config.run.start_timeout_s, display)
        refuse_other_teachers(descriptions, identities)
        return descriptions
    except BaseException:
        stop_pools(started)
        raise


def _supervise_detached(config: Config, teacher: TeacherConfig) -> Any:
    name = _actor(teacher.name)
    try:
        return supervise(config, [teacher], name=name, namespace=NAMESPACE, lifetime="detached")
    except ValueError as error:  # how Ray says that a name is taken
        raise ClusterError(
            f"teacher {teacher.name} has just been started by another command ({error}); wait for it, then try again"
        ) from error


def attach(config: Config) -> dict[str, Any]:
    """The running pools of the config's teachers; they may still be loading.

    Raises:
        ClusterError: one is not running.
        ConfigError: one runs with other settings; the message says which.
    """
    pools = {}
    for teacher in config.active_teachers:
        pools[teacher.name] = find_pool(teacher.name)
        if pools[teacher.name] is None:
            raise ClusterError(
                f"teacher {teacher.name} does not run on this cluster; start it with "
                "`fusellm-ray teachers up CONFIG`, or train without --attach"
            )
    _refuse_what_does_not_fit(config, pools)
    return pools


def statuses(config: Config) -> dict[str, PoolStatus | str]:
    """How each teacher of the config stands; a text for one that does not run or does not answer."""
    found: dict[str, PoolStatus | str] = {}
    for teacher in config.active_teachers:
        pool = find_pool(teacher.name)
        found[teacher.name] = "does not run" if pool is None else _status_or_problem(teacher.name, pool)
    return found


def take_down(config: Config) -> list[str]:
    """End the config's teachers and all their processes; returns the names of those that ran.

    Raises:
        ClusterError: a pool is still there after half a minute.
    """
    pools = {t.name: pool for t in config.active_teachers if (pool := find_pool(t.name)) is not None}
    stop_pools(pools)
    give_up = time.monotonic() + _GONE_S
    while left := [name for name in pools if find_pool(name) is not None]:
        if time.monotonic() > give_up:
            raise ClusterError(
                f"teachers {', '.join(left)}: told to end {_GONE_S:.0f} s ago, and still there"
            )
        time.sleep(0.2)
    return list(pools)


def print_statuses(found: dict[str, PoolStatus | str]) -> None:
    """The table of `fusellm-ray teachers status`."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title="teachers", title_justify="left")
    for heading in (
        "teacher",
        "replicas",
        "queued tokens",
        "tokens/s",
        "from cache",
        "latest decision or problem",
    ):
        table.add_column(
            heading, justify="left" if heading in ("teacher", "latest decision or problem") else "right"
        )
    for name, status in found.items():
        if isinstance(status, str):
            table.add_row(name, "-", "-", "-", "-", escape(status))
            continue
        said = [*status.problems, *(f"→ {d.replicas}: {d.reason}" for d in status.decisions[-3:])]
        table.add_row(
            name,
            f"{status.ready} ({status.wanted}..{status.most})",
            f"{status.queued_tokens:,}",
            f"{status.tokens_per_s:,.0f}",
            f"{status.cache_hit_share:.0%}",
            escape("\n".join(said)),
        )
    console.print(table)


def find_pool(teacher: str) -> Any | None:
    """The supervisor of a running teacher's pool, if there is one."""
    try:
        return ray.get_actor(_actor(teacher), namespace=NAMESPACE)
    except ValueError:
        return None


def _actor(teacher: str) -> str:
    return f"teacher:{teacher}"


def _status_or_problem(teacher: str, pool: Any) -> PoolStatus | str:
    answer = pool.status.remote(teacher)
    answered, _ = ray.wait([answer], timeout=_ANSWER_S)
    if not answered:
        return f"no answer from its pool within {_ANSWER_S:.0f} s"
    try:
        return get_status(answer)
    except (FuseLLMError, RayError) as error:
        return summary_of(cause_of(error))


def _refuse_what_does_not_fit(config: Config, pools: dict[str, Any]) -> None:
    for teacher in config.active_teachers:
        if teacher.name not in pools:
            continue
        status = _status_or_problem(teacher.name, pools[teacher.name])
        if isinstance(status, str):
            raise ClusterError(
                f"teacher {teacher.name} runs, and cannot work: {status}; look at its log, then "
                "`fusellm-ray teachers down CONFIG` and up again"
            )
        differing = differences(status.settings, answer_settings(teacher, config.alignment))
        if differing:
            raise ConfigError(
                f"teacher {teacher.name} runs with other settings than this config wants:\n  "
                + "\n  ".join(differing)
                + "\nchange the config, give the teacher another name, or take the running one down"
            )
        deadline_s = config.stream.deadline_s
        if config.stream.on_teacher_loss == "wait" and deadline_s <= status.hang_s:
            raise ConfigError(
                f"stream.deadline_s={deadline_s:g}: the running teacher {teacher.name} restarts a replica that hangs "
                f"after {status.hang_s:g} s, half of the deadline it was brought up with; the run would have ended "
                f"before. Set stream.deadline_s above {status.hang_s:g}, or take the teacher down and up again with "
                "this config"
            )

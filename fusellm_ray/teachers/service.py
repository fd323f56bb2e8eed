"""The driver's side of the teachers: start them all, wait for them with an explanation, stop them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fusellm_ray.config import Config, TeacherConfig
from fusellm_ray.errors import ClusterError, ConfigError, FuseLLMError
from fusellm_ray.models import model_facts
from fusellm_ray.observe.progress import Display
from fusellm_ray.stream.failures import cause_of, summary_of
from fusellm_ray.teachers.identity import differences
from fusellm_ray.teachers.pool import STOP_TIMEOUT_S
from fusellm_ray.teachers.report import Description, PoolStatus
from fusellm_ray.teachers.supervisor import PoolSupervisor

SLOW_START_S = 60.0
"""After so long without what was asked for, the driver says what it waits for."""
_UNTOLD = re.compile(r"node:|memory|object_store_memory|\w+_group_(\d+_)?[0-9a-f]{36}$")
"""Resources that help nobody who asks why replicas wait; the last ones are a placement group's part of another."""


def start_pools(config: Config) -> dict[str, Any]:
    """Begin to start every teacher that the run listens to; returns whom to ask, by teacher."""
    if not config.active_teachers:
        return {}
    return dict.fromkeys([t.name for t in config.active_teachers], supervise(config, config.active_teachers))


def supervise(config: Config, teachers: Sequence[TeacherConfig], **options: Any) -> Any:
    """Begin to start some teachers; returns their `PoolSupervisor`. `options` are Ray's, for this actor.

    It lives on the driver's node while there is one: on a teacher's, it would go with a node that may be taken away.

    Raises:
        ModelError: the target cannot be read.
    """
    target_vocab_size = model_facts(config.target).vocab_size
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        ray.remote(PoolSupervisor)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here, **options)
        .remote(
            teachers,
            config.target,
            config.alignment,
            config.stream.deadline_s / 2,
            load_s=config.run.start_timeout_s,
            target_vocab_size=target_vocab_size,
        )
    )


def wait_ready(
    pools: Mapping[str, Any],
    timeout_s: float,
    display: Display | None = None,
    slow_s: float = SLOW_START_S,
) -> dict[str, Description]:
    """Wait until every pool has the replicas it asked for.

    Args:
        pools: as `start_pools` gave them.
        timeout_s: for all of them.
        display: told a line a teacher whenever one changes.
        slow_s: after so long it is also told, once, what the cluster has and when we give up.

    Raises:
        ClusterError: time is up; the message compares what is asked for with what the cluster has.
        FuseLLMError: a teacher cannot be loaded.
    """
    if not pools:
        return {}
    display = display or Display()
    started = time.monotonic()
    has_said_so = False
    asked: dict[str, Any] = {}
    statuses: dict[str, PoolStatus] = {}
    said: dict[str, str] = {}
    while True:
        for name, pool in pools.items():
            if name not in asked:
                asked[name] = pool.status.remote(name)
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=0.5)
        for name in [name for name, ref in asked.items() if ref in answered]:
            statuses[name] = get_status(asked.pop(name))
        lines = {name: _line(statuses.get(name)) for name in pools}
        if lines != said:
            display.teachers(lines)
        said = lines
        up = {s.name: s.description for s in statuses.values() if s.description and s.ready >= s.wanted}
        if len(up) == len(pools):
            return up
        waiting = "; ".join(f"teacher {name}: {line}" for name, line in lines.items() if name not in up)
        waited_s = time.monotonic() - started
        if waited_s > timeout_s:
            raise ClusterError(
                f"teachers are not up after {timeout_s:.0f} s (run.start_timeout_s): {waiting}. {_shortage()}"
            )
        if waited_s > slow_s and not has_said_so:
            has_said_so = True
            display.note(
                f"teachers are not up yet ({waiting}). {_shortage()}. Giving up after {timeout_s:.0f} s "
                "(run.start_timeout_s)"
            )
        time.sleep(0.2)


def refuse_other_teachers(
    descriptions: Mapping[str, Description], identities: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compare what is loaded with what the config means on the driver's node.

    Args:
        descriptions: as `wait_ready` gave them; a pool sees to it that all replicas are what its first one is.
        identities: as `plan.preflight` made them, by teacher.

    Raises:
        ConfigError: a model, a tokenizer or a setting differs; the message says which.
    """
    for name, description in descriptions.items():
        differing = differences(description.identity, identities[name])
        if differing:
            raise ConfigError(
                f"teacher {name} on {description.node} is not what this config means on this node:\n  "
                + "\n  ".join(differing)
                + "\nlet all nodes see the same folders and name hub commits as revision; teachers that were up "
                "before: take them down and up again, or give the config's another name"
            )


class PoolWatch:
    """Asks pools how they stand, now and then, and never waits for an answer.

    Args:
        pools: handles by teacher.
        every_s: between two rounds.
    """

    def __init__(self, pools: Mapping[str, Any], every_s: float = 10.0) -> None:
        self._pools = pools
        self._every_s = every_s
        self._asked: dict[str, Any] = {}
        self._round_at = time.monotonic()

    def poll(self) -> dict[str, dict[str, Any]] | None:
        """By teacher, once a round, when all have answered or the next round begins; else None."""
        is_due = time.monotonic() >= self._round_at
        waiting = (
            self._asked and ray.wait([*self._asked.values()], num_returns=len(self._asked), timeout=0)[1]
        )
        answers = None
        if self._asked and (is_due or not waiting):
            answers = {name: self._answer(ref, is_late=ref in waiting) for name, ref in self._asked.items()}
            self._asked = {}
        if is_due:
            self._asked = {name: pool.status.remote(name) for name, pool in self._pools.items()}
            self._round_at = time.monotonic() + self._every_s
        return answers

    def _answer(self, ref: Any, *, is_late: bool) -> dict[str, Any]:
        try:
            status = None if is_late else ray.get(ref)
            problems = ["its pool does not answer"] if status is None else list(status.problems)
        except RayError as error:
            status, problems = None, [summary_of(cause_of(error))]
        figures = {
            name: getattr(status, name, 0) for name in ("ready", "wanted", "queued_tokens", "restarts")
        }
        return figures | {"problems": problems}


def stop_pools(pools: Mapping[str, Any]) -> None:
    """End supervisors and all their replicas, and wait for it. Idempotent."""
    supervisors = set(pools.values())
    stops = [supervisor.stop.remote() for supervisor in supervisors]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=STOP_TIMEOUT_S + 5)
    for supervisor in supervisors:
        ray.kill(supervisor)


def get_status(answer: Any) -> PoolStatus:
    """What a pool's `status` answers.

    Raises:
        FuseLLMError: the teacher cannot work.
    """
    try:
        return ray.get(answer)
    except RayTaskError as error:
        if isinstance(error.cause, FuseLLMError):
            raise error.cause from None
        raise


def _line(status: PoolStatus | None) -> str:
    if status is None:
        return "its pool is starting"
    line = f"{status.ready}/{status.wanted} replicas ready"
    if status.ready < status.wanted:
        line += f", each asks for {_amounts(status.asks)}"
        line += "".join(f" on a node with {name}={value}" for name, value in status.labels.items())
    return f"{line} ({'; '.join(status.problems)})" if status.problems else line


def _shortage() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = sorted(name for name in total if not _UNTOLD.match(name))
    has, rest = ({kind: amounts.get(kind, 0) for kind in kinds} for amounts in (total, free))
    return f"The cluster has {_amounts(has)}; free: {_amounts(rest)}"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items() if amount) or "nothing"

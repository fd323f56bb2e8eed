"""Children on a leash: they end with their parent, and their parent learns why they ended."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil

from fusellm_ray.teachers.leash import Watch, on_leash, read_report

SPAWN = multiprocessing.get_context("spawn")


def wait_for_ever(writer: Connection) -> None:
    with on_leash(writer):
        time.sleep(600)


def wait_for_ever_with_a_worker(writer: Connection) -> None:
    """As an engine core whose workers load their weights."""
    with on_leash(writer):
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(os.getpid(), worker.pid, flush=True)
        time.sleep(600)


def fail(writer: Connection) -> None:
    with on_leash(writer):
        try:
            raise OSError("no such GPU")
        except OSError as error:
            raise RuntimeError("did not start") from error


def start(target: Callable[[Connection], None]) -> tuple[Connection, multiprocessing.process.BaseProcess]:
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = SPAWN.Process(target=target, args=(writer,))
    child.start()
    writer.close()
    return reader, child


def is_gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_child_and_all_it_started_end_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-m", "tests.test_leash"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(psutil.pid_exists, pids))
    parent.kill()
    parent.wait()
    assert all(is_gone(pid, within_s=20) for pid in pids)


def test_failed_child_reports_its_error_and_where_it_came_from() -> None:
    reader, child = start(fail)
    assert read_report(reader) == "RuntimeError: did not start, from OSError: no such GPU"
    child.join()


def test_killed_child_is_noticed_with_its_signal() -> None:
    async def watch() -> str:
        reader, child = start(wait_for_ever)
        watching = Watch(reader, [child])
        assert not watching.death.done()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        reason = await asyncio.wait_for(watching.death, timeout=20)
        await watching.stop(shut_down=lambda: None)
        return reason

    assert "SIGKILL" in asyncio.run(watch())


def test_stop_ends_a_child_that_does_not_end_by_itself(monkeypatch) -> None:
    monkeypatch.setattr("fusellm_ray.teachers.leash._GRACE_S", 0.1)

    async def stop() -> tuple[int | None, str]:
        reader, child = start(wait_for_ever)
        watching = Watch(reader, [child])
        death = watching.death
        await watching.stop(shut_down=lambda: None)
        return child.exitcode, death.result()

    assert asyncio.run(stop()) == (-signal.SIGKILL, "it was stopped")


if __name__ == "__main__":
    start(wait_for_ever_with_a_worker)
    time.sleep(600)

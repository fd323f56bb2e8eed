"""A child process that cannot outlive its parent, and whose parent learns why it ended.

    parent                                     child
    Watch(reader, children) ←── one pipe ───── with on_leash(writer): …
    Watch.death, a future: set at the pipe's end to the error the child reported, or to its exit signal

An engine's core holds the GPU. Left behind by a killed replica, it would leave none for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil

_POLL_S = 0.5
_GRACE_S = 5.0
"""How long a dying child may take to say why, and a stopped one to end by itself."""
_REAPED_S = 1.0
"""How long the exit code of a child that is gone may take to be known."""


@contextlib.contextmanager
def on_leash(writer: Connection) -> Iterator[None]:
    """In the child: be killed when the parent is gone, with all that it has started, and report an exception to the
    parent before raising it on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()
    try:
        yield
    except Exception as error:
        root: BaseException = error
        while below := root.__cause__ or root.__context__:
            root = below
        # The outermost error is often no more than "it failed, see above".
        reasons = dict.fromkeys(f"{type(e).__name__}: {e}" for e in (error, root))
        writer.send_bytes(", from ".join(reasons).encode())
        raise


def _end_with(parent_pid: int | None) -> None:
    """Poll: a killed parent runs no clean-up, and PR_SET_PDEATHSIG follows its thread, not the parent."""
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    # vLLM's workers look after themselves only once they have loaded their weights.
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


class Watch:
    """In the parent: what becomes of the children that hold the other end of `reader`. Lives in one loop."""

    def __init__(self, reader: Connection, children: Iterable[BaseProcess]) -> None:
        self._reader = reader
        self._children = list(children)
        self._descendants: list[psutil.Process] = []
        for child in self._children:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._descendants += psutil.Process(child.pid).children(recursive=True)
        self._death: asyncio.Future[str] | None = None

    @property
    def death(self) -> asyncio.Future[str]:
        """Resolves, once the child has ended, to the reason."""
        if self._death is None:
            loop = asyncio.get_running_loop()
            self._death = loop.create_future()
            loop.add_reader(self._reader.fileno(), self._note_death)
        return self._death

    def _note_death(self) -> None:
        self._settle(read_report(self._reader) or self._exit_signal() or "it gave no cause; see its log")

    def _exit_signal(self) -> str | None:
        for child in self._children:
            deadline = time.monotonic() + _REAPED_S
            # Another thread may have reaped it and not noted its exit code yet.
            while child.exitcode is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if child.exitcode is not None and child.exitcode < 0:
                name = signal.Signals(-child.exitcode).name
                return f"process {child.pid} was ended by {name}" + " (out of memory?)" * (name == "SIGKILL")
        return None

    def _settle(self, reason: str) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.get_loop().remove_reader(self._reader.fileno())
            self._death.set_result(reason)

    async def stop(self, shut_down: Callable[[], None]) -> None:
        """Ask the children to end, and see to it that they and all they started do."""
        if self._death is not None:
            self._settle("it was stopped")
        await asyncio.to_thread(self._reap, shut_down)
        self._reader.close()

    def _reap(self, shut_down: Callable[[], None]) -> None:
        shut_down()
        for child in self._children:
            child.join(_GRACE_S)
            child.kill()
            child.join()
        _, alive = psutil.wait_procs(self._descendants, timeout=_GRACE_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive)


def read_report(reader: Connection) -> str | None:
    """What a child said before it ended; waits a little for one that is still ending."""
    try:
        return reader.recv_bytes().decode() if reader.poll(_GRACE_S) else None
    except EOFError:
        return None

"""A node that kills itself: `python -m tests.chaos.crashing_node ROLE`, for the tests of crash points.

It runs `stampline worker ROLE` again and again. Each process dies by SIGKILL at a point of the first batch that it
gets: the first one there that no process before it has died at. The one that finds no such point goes on as any node.
The places are printed as they are reached.

A point is a place where the event loop changes hands: every `await` that waits has one before ("asked for, but not
there") and one after it ("there, but nothing done with it yet"); where a batch comes by one place several times, each
time is a point of its own. They are those between the fetch of the records and the moment when the lane has taken
note that the batch is done, in everything that works for it:

- the lane: from fetch to delivery through Faust, and the wait for the batch;
- the agent: before and after it starts the batch;
- the role's `process`, with every task that is made inside it;
- the producers' senders: a request to Kafka has its bytes out at the first point and its answer at the second;
- the commit of offsets, in the consumer's thread.

Nothing in the production code knows of it. Each process is a fork of this one, which has only imported: starting it
takes a tenth of a second, not more than one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import ContextVar
from types import CodeType
from typing import Any, Final

from aiokafka import AIOKafkaConsumer

from pipeline.lanes import Batch, Lane
from pipeline.settings import load_settings
from pipeline.worker import ROLES, run_until_signalled

#: The tasks whose steps are points; so are those of the tasks that they make, the producers' senders among them.
_ROOTS: Final[frozenset[CodeType]] = frozenset({Lane._live.__code__, Batch._run.__code__})

_followed: ContextVar[bool] = ContextVar("followed", default=False)


class Crash:
    """Kills the process at the first point of its first batch that is not among the known ones.

    Args:
        known: the points where a process has died before.
        last_words: told the point before the end.
    """

    def __init__(self, known: set[str], last_words: Callable[[str], Any]) -> None:
        self._known = known
        self._last_words = last_words
        self._seen: Counter[str] = Counter()
        self._counting = False

    def begin(self) -> bool:
        """Tell whether this is the beginning of the first batch; from here on there are points."""
        begins = not self._counting and not self._seen
        self._counting = self._counting or begins
        return begins

    def end(self) -> None:
        """The batch is done; a process that has not been killed lives on."""
        if self._counting:
            self._counting = False
            tell(survived=self._seen.total())

    def point(self, place: str) -> None:
        """Be a point, and perhaps the last one."""
        if not self._counting:
            return
        self._seen[place] += 1
        name = f"{place} ({self._seen[place]})"
        if name not in self._known:
            self._last_words(name)
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # Until the signal arrives.


class Steps:
    """An awaitable that does what a coroutine does, step by step, with a point before and after each wait."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], crash: Crash) -> None:
        self._coroutine = coroutine
        self._crash = crash

    def __await__(self) -> Generator[Any, Any, Any]:
        """Drive the coroutine."""
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                awaited = self._coroutine.send(answer) if error is None else self._coroutine.throw(error)
            except StopIteration as done:
                return done.value
            place = find_place(self._coroutine)
            self._crash.point(f"{place} waits")
            answer, error = None, None
            try:
                answer = yield awaited
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as exc:  # noqa: BLE001 (whatever it is, it is the coroutine's)
                error = exc
            self._crash.point(f"{place} goes on")


def find_place(coroutine: Any) -> str:
    """Return the names of the nested coroutines, from outside to where it waits, with the innermost line."""
    names = []
    line = 0
    while getattr(coroutine, "cr_code", None) is not None:
        names.append(coroutine.cr_code.co_qualname)
        line = coroutine.cr_frame.f_lineno if coroutine.cr_frame is not None else line
        coroutine = coroutine.cr_await
    return f"{' > '.join(names)}:{line}"


def tell(**facts: object) -> None:
    """Print facts as one line of JSON, at once and whole, whatever happens next."""
    os.write(1, json.dumps({"event": "crash", **facts}).encode() + b"\n")


def make_task_factory(crash: Crash) -> Callable[..., asyncio.Task[Any]]:
    """Return a task factory that follows the steps of the tasks that work for a batch."""

    async def follow(coroutine: Coroutine[Any, Any, Any]) -> Any:
        _followed.set(True)  # For the tasks that this one makes.
        return await Steps(coroutine, crash)

    def make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        if _followed.get() or getattr(coroutine, "cr_code", None) in _ROOTS:
            coroutine = follow(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    return make_task


def plant(crash: Crash) -> None:
    """Plant the points that are not steps of a task of the main loop, and the beginning and the end of a batch."""
    offer, start, process, commit = Lane.offer, Batch.start, Lane._process, AIOKafkaConsumer.commit

    def offer_and_count(lane: Lane, number: int, records: Any) -> None:
        begins = crash.begin()
        if begins:
            crash.point("Lane.offer: fetched")
        offer(lane, number, records)
        if begins:
            crash.point("Lane.offer: gathered")

    def start_and_count(batch: Batch, work: Callable[[Batch], Awaitable[None]]) -> None:
        crash.point("Batch.start: the agent has it")
        start(batch, work)
        crash.point("Batch.start: begun")

    async def process_and_count(lane: Lane, batch: Batch) -> None:
        crash.point("Lane._process: not delivered yet")
        await process(lane, batch)
        crash.point("Lane._process: done")
        crash.end()

    async def commit_and_count(consumer: AIOKafkaConsumer, offsets: Any) -> None:
        await Steps(commit(consumer, offsets), crash)

    Lane.offer = offer_and_count  # type: ignore[assignment, method-assign]
    Batch.start = start_and_count  # type: ignore[assignment, method-assign]
    Lane._process = process_and_count  # type: ignore[assignment, method-assign]
    AIOKafkaConsumer.commit = commit_and_count


async def run_node(role: str, crash: Crash) -> None:
    """Run the role as `stampline worker` does, with the crash planted."""
    plant(crash)
    asyncio.get_running_loop().set_task_factory(make_task_factory(crash))
    await run_until_signalled(load_settings(), [role])


def run_child(role: str, known: set[str], parent: socket.socket) -> None:
    """Run a node in a process of its own, which ends with its parent at the latest."""

    def end_with_the_parent() -> None:
        parent.recv(1)
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    asyncio.run(run_node(role, Crash(known, lambda name: parent.sendall(name.encode()))))


def main(role: str) -> int:
    """Run one process after the other, each as a fork of this one."""
    assert role in ROLES
    known: set[str] = set()
    while True:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            run_child(role, known, theirs)
            return 0
        theirs.close()
        with ours:
            name = ours.recv(2**16).decode()
            _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != -signal.SIGKILL or not name:
            return code
        known.add(name)
        tell(killed=name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

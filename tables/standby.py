"""Standbys: copies of partitions that other nodes work on, kept up to date, so that a takeover reads only the rest.

Faust's assignor says which partitions a node stands by for (TABLE_STANDBY_REPLICAS), and prefers such a node when their
owner goes. Each copy has a task of its own: it restores the store as a lane would, then follows the changelog. A fault
is told once and tried again; a copy is never worth a process.

A store has one writer. So before a lane opens a partition it waits for the end of the copy's task (`hand_over`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Final

from pipeline.errors import StamplineError
from pipeline.logreader import LogReader
from pipeline.logs import get_logger
from pipeline.settings import Settings
from tables.changelog import load, restore
from tables.store import BatchStore, release

_BACKOFF_BASE_SECONDS: Final = 0.1
_BACKOFF_CAP_SECONDS: Final = 10.0

#: Loaded at once, after which others on the loop have their turn.
_LOAD_RECORDS_MAX: Final = 2_500
#: How long an idle copy waits for a record before it asks again, in ms.
_IDLE_MS: Final = 1000

log = get_logger("stampline.standby")


class Standbys:
    """The copies that this process keeps of one table's partitions.

    Args:
        settings: where Kafka is, and how long the end of a task is waited for.
        changelog: the table's changelog topic.
    """

    def __init__(self, settings: Settings, changelog: str) -> None:
        self._settings = settings
        self._changelog = changelog
        self._copies: dict[int, _Copy] = {}
        #: Those that may still write to the store of a partition.
        self._tasks: defaultdict[int, set[asyncio.Task[None]]] = defaultdict(set)

    def follow(self, stores: BatchStore, numbers: Collection[int]) -> None:
        """Keep copies of these partitions and of no others, and answer nobody from them; return at once."""
        stores.standbys = set(numbers)
        for tasks in self._tasks.values():
            _cancel(tasks)
        self._copies = {number: _Copy(self._settings, self._changelog, stores, number) for number in sorted(numbers)}
        for number, copy in self._copies.items():
            task = asyncio.create_task(copy.keep(set(self._tasks[number])))
            self._tasks[number].add(task)
            task.add_done_callback(self._tasks[number].discard)

    async def unfollow(self) -> None:
        """End the tasks of all copies, within the bound for revoked partitions; the copies stay as they are."""
        self._copies = {}
        tasks = _cancel(task for running in self._tasks.values() for task in running)
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.revoke_timeout_ms / 1000)

    async def hand_over(self, number: int) -> None:
        """Return when nothing writes to the copy of a partition any more: its store is the caller's."""
        self._copies.pop(number, None)
        tasks = _cancel(self._tasks[number])
        if tasks:
            await asyncio.wait(tasks)

    def status(self) -> dict[int, str]:
        """What the copy of each partition is doing, by partition number."""
        return {number: copy.status for number, copy in self._copies.items()}


def _cancel(tasks: Iterable[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Cancel those that were not told yet: told twice, a task would not let go of its connections."""
    told = set(tasks)
    for task in told:
        if not task.cancelling():
            task.cancel()
    return told


def _is_cancelled() -> bool:
    """Whether this task was told to end, also where `asyncio.wait_for` of Python 3.11 has swallowed it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Copy:
    """The copy of one partition."""

    def __init__(self, settings: Settings, changelog: str, stores: BatchStore, number: int) -> None:
        #: `following, N records behind`, or why it is not.
        self.status = "opening"
        self._settings = settings
        self._changelog = changelog
        self._stores = stores
        self._number = number
        #: The fault that was told last; None = none since it last followed.
        self._told: str | None = None
        self._attempt = 0

    async def keep(self, earlier: Collection[asyncio.Task[None]]) -> None:
        """Keep it up to date until cancelled, once these tasks of earlier copies have ended."""
        if earlier:
            await asyncio.wait(earlier)
        while not _is_cancelled():
            try:
                await self._follow()
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                self._tell("something inside it was cancelled")
            except StamplineError as exc:
                self._tell(str(exc))
            except Exception as exc:  # noqa: BLE001 - told with its traceback
                self._tell(f"{type(exc).__name__}: {exc}", exc)
            # As a lane does: what is on disk is opened again, so a person may delete it meanwhile.
            await release(self._stores, self._number)
            most = min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2 ** min(self._attempt, 16))
            self._attempt += 1
            await asyncio.sleep(random.uniform(_BACKOFF_BASE_SECONDS / 2, most))

    async def _follow(self) -> None:
        """Restore the store to the end of the changelog, and go on from there.

        Raises:
            StamplineError: as `restore`, `load` and `LogReader.follow`.
        """
        started = time.perf_counter()
        store = self._stores.partition(self._number)
        count = await restore(self._settings, self._changelog, self._number, store, report=self._report)
        log.info(
            "standby_following",
            partition=self._number,
            records=count,
            keys=len(store),
            duration_ms=round((time.perf_counter() - started) * 1000),
        )
        async with LogReader(self._settings, self._changelog, self._number, wait_ms=_IDLE_MS) as reader:
            async for records in reader.follow(store.position, _LOAD_RECORDS_MAX):
                # Without records it has passed a marker, or what was aborted.
                if reader.position > store.position:
                    load(store, records, reader.position)
                self.status = f"following, {max(0, reader.end - reader.position)} records behind"
                self._told, self._attempt = None, 0
                if _is_cancelled():
                    return

    def _report(self, _records: int, remaining: int) -> None:
        self.status = f"restoring: {remaining} records left"

    def _tell(self, fault: str, bug: Exception | None = None) -> None:
        """Keep a fault as the status, and log it if it is another one than before."""
        self.status = fault
        if fault != self._told:
            self._told = fault
            log.warning("standby_failed", partition=self._number, error=fault, exc_info=bug)

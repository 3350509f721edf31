"""Lanes: one for each assigned partition; it opens, processes batch after batch, and ends.

A lane gathers records while its batch is in flight, so a batch is small when little comes and large when much does.
It knows three kinds of failure: a batch that left no trace is tried again; a partition that another process has
taken is dropped; after anything else the partition is closed and opened again, which finds out the truth. Each
pause has jitter and grows to a bound.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from faust.types import TP

from pipeline.errors import BatchAborted, PartitionFenced, PositionLost, StamplineError, WorkCancelled
from pipeline.logs import get_logger
from pipeline.settings import Settings
from pipeline.topics import topic_name

log = get_logger("stampline.lanes")

_BACKOFF_BASE_SECONDS: Final = 0.05
_BACKOFF_CAP_SECONDS: Final = 5.0

#: What people call a partition of a role: its number, or `TOPIC/NUMBER` where it is not of the role's main topic.
Label: TypeAlias = int | str


class Role(Protocol):
    """What a role does with its partitions. All three may be called again for the same partition."""

    async def open(self, tp: TP, consumer: Any) -> int:
        """Take over a partition (fence the owner before, restore its state) and return the offset to start at."""

    async def close(self, tp: TP) -> None:
        """Let go of a partition; its state may be kept for the case that it comes back."""

    def retain(self, tps: Iterable[TP]) -> None:
        """Forget the state of every partition that is not among these: a rebalance has ended.

        Args:
            tps: the input partitions of this node, and the changelog partitions that it follows.
        """


@runtime_checkable
class Follower(Role, Protocol):
    """A role that also keeps copies of the state of partitions that other nodes work on, to take over quickly."""

    def follow(self, changelogs: Collection[TP]) -> None:
        """Keep copies of the state in these changelog partitions, and of no others; return at once."""

    async def unfollow(self) -> None:
        """Stop that, within the bound for revoked partitions. The copies stay, until `retain` drops them."""

    def copies(self) -> Mapping[int, str]:
        """Return what the copy of each followed partition is doing, by partition number."""


@runtime_checkable
class SeveralTopics(Role, Protocol):
    """A role that reads several topics; a role that does not say so reads one."""

    @property
    def main_topic(self) -> str:
        """The topic, with its prefix, whose partitions are called by their numbers alone."""


def label(settings: Settings, main_topic: str | None, tp: TP) -> Label:
    """Return what people call a partition.

    Args:
        settings: the prefix of the topics, which is left out.
        main_topic: the role's main topic; None = it reads one.
        tp: the partition.
    """
    if main_topic in {None, tp.topic}:
        return tp.partition
    return f"{tp.topic.removeprefix(topic_name(settings, ''))}/{tp.partition}"


class Batch:
    """The records of one partition that are processed together: the value of a Faust event."""

    __slots__ = ("_done", "_task", "records", "tp")

    def __init__(self, tp: TP, records: Sequence[Any]) -> None:
        self.tp = tp
        #: aiokafka's records, in order, never empty.
        self.records = records
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    @property
    def next_offset(self) -> int:
        """The offset to commit once the batch is done."""
        return int(self.records[-1].offset) + 1

    def start(self, process: Callable[[Batch], Awaitable[None]]) -> None:
        """Process the batch beside those of other partitions; its lane waits for it and handles its errors."""
        if not self._done.done():
            self._task = asyncio.ensure_future(self._run(process))

    async def _run(self, process: Callable[[Batch], Awaitable[None]]) -> None:
        try:
            await process(self)
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is None or task.cancelling() or self._done.done():
                self._done.cancel()
                raise
            # Nobody cancelled the batch: something inside it was, which is a failure like any other.
            self._done.set_exception(WorkCancelled().with_traceback(exc.__traceback__))
        except BaseException as exc:  # noqa: BLE001 (the lane that waits for `_done` gets it)
            if not self._done.done():
                self._done.set_exception(exc)
        else:
            if not self._done.done():
                self._done.set_result(None)

    async def finished(self) -> None:
        """Wait until the batch is processed, and raise what it raised. Cancelling the wait cancels the work."""
        try:
            await asyncio.shield(self._done)
        except asyncio.CancelledError:
            self._done.cancel()
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
            raise


class _Deliverer(Protocol):
    """What lanes need of the consumer."""

    @property
    def thread(self) -> Any: ...

    async def deliver(self, batch: Batch) -> None: ...

    async def start_at(self, tp: TP, offset: int) -> int: ...


class Lane:
    """One partition's way through this process."""

    def __init__(
        self, tp: TP, role: Role, consumer: _Deliverer, settings: Settings, on_live: Callable[[], None]
    ) -> None:
        self.tp = tp
        self._on_live = on_live
        #: What it is doing: `opening`, `live`, or why it is not.
        self.status = "opening"
        #: What it failed with when it last failed, if that was an error of ours; None while it is live.
        self.fault: StamplineError | None = None
        self._role = role
        self._consumer = consumer
        self._settings = settings
        self._open = False
        self._start = 0
        self._pending: list[Any] = []
        self._pending_bytes = 0
        self._arrived = asyncio.Event()
        self._lost = False
        self._busy = False
        self._stopping = False
        self._task = asyncio.ensure_future(self._live())

    @property
    def live(self) -> bool:
        """Whether the partition is open and its last batch did not fail."""
        return self.status == "live"

    @property
    def ended(self) -> bool:
        """Whether the lane's task has ended though nobody asked it to: a fault of ours."""
        return self._task.done() and not self._stopping

    def report(self, status: str) -> None:
        """Tell how far the opening has come, for those who look at the node."""
        if not self._open:
            self.status = status

    @property
    def has_room(self) -> bool:
        """Whether more records may be fetched."""
        return (
            self._open
            and self._pending_bytes < self._settings.batch_bytes_max
            and len(self._pending) < self._settings.batch_records_max
        )

    def offer(self, start: int, records: Sequence[Any]) -> None:
        """Take fetched records, unless they were fetched before this lane's own start; that one brings them again."""
        if self._open and start == self._start:
            self._pending.extend(records)
            self._pending_bytes += sum(len(record.value or b"") + len(record.key or b"") for record in records)
            self._arrived.set()

    def lose_position(self) -> None:
        """Stop: the log does not hold the position any more. Opening again tells which offsets are gone."""
        self._open = False
        self._lost = True
        self._arrived.set()

    async def _live(self) -> None:
        attempt, fenced = 0, False
        while not self._stopping:
            try:
                position = await self._role.open(self.tp, self._consumer)
                self._start = await self._consumer.start_at(self.tp, position)
                self._pending.clear()
                self._pending_bytes = 0
                self._lost = False
                self._open, self.status, self.fault = True, "live", None
                self._on_live()
                while not self._stopping:
                    await self._process(await self._take())
                    attempt = 0
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._stopping or task is None or task.cancelling():
                    raise
                self.status = "something inside it was cancelled"
                log.exception("partition_failed", topic=self.tp.topic, partition=self.tp.partition, error=self.status)
            except PartitionFenced as exc:
                self.status = f"fenced: {exc}"
                fenced = True
                log.warning("partition_fenced", topic=self.tp.topic, partition=self.tp.partition, error=str(exc))
            except StamplineError as exc:
                self.status, self.fault = str(exc), exc
                log.error("partition_failed", topic=self.tp.topic, partition=self.tp.partition, error=str(exc))
            except Exception as exc:
                self.status = f"{type(exc).__name__}: {exc}"
                log.exception("partition_failed", topic=self.tp.topic, partition=self.tp.partition, error=str(exc))
            finally:
                # Busy until it is closed: `end` lets a close be, which has a bound of its own.
                self._open, self._busy = False, True
                await self._close()
                self._busy = False
            if not self._stopping:
                await (self._wait_for_the_group() if fenced else _pause(attempt))
                attempt += 1
                fenced = False

    async def _wait_for_the_group(self) -> None:
        """Let the group find out and take the partition away.

        Opening it at once would fence its new owner, who would fence us. Only if nothing has happened for longer than
        the group needs is the partition ours again.
        """
        session_seconds = self._settings.kafka_session_timeout_ms / 1000
        await asyncio.sleep(random.uniform(session_seconds, 2 * session_seconds))

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(self._settings.revoke_timeout_ms / 1000):
                await self._role.close(self.tp)
        except Exception:
            log.exception("partition_not_closed", topic=self.tp.topic, partition=self.tp.partition)

    async def _take(self) -> Batch:
        """Wait for records and take all that there are, up to the bounds of a batch."""
        while not self._pending and not self._lost:
            self._arrived.clear()
            await self._arrived.wait()
        if self._lost:
            raise PositionLost
        had_room = self.has_room
        most = self._settings.batch_records_max
        taken, self._pending = self._pending[:most], self._pending[most:]
        self._pending_bytes = sum(len(record.value or b"") + len(record.key or b"") for record in self._pending)
        if not had_room:
            self._consumer.thread.wake()
        return Batch(self.tp, taken)

    async def _process(self, batch: Batch) -> None:
        """Have the agent process the batch, again and again while it leaves no trace."""
        attempt = 0
        self._busy = True
        while True:
            try:
                await self._consumer.deliver(batch)
                await batch.finished()
            except BatchAborted as exc:
                log.warning(
                    "batch_aborted", topic=self.tp.topic, partition=self.tp.partition, attempt=attempt, error=str(exc)
                )
                await _pause(attempt)
                attempt += 1
                batch = Batch(batch.tp, batch.records)
            else:
                self._busy = False
                return

    async def end(self, timeout_seconds: float) -> None:
        """Give the batch in flight its time, then cancel it; return when the partition is closed."""
        self._stopping = True
        self._open = False
        if not self._busy:
            self._task.cancel()
        _, running = await asyncio.wait([self._task], timeout=timeout_seconds)
        for task in running:
            task.cancel()
            await asyncio.wait([task])


class Lanes:
    """The lanes of one node, by partition."""

    def __init__(self, role: Role, consumer: _Deliverer, settings: Settings) -> None:
        self._role = role
        self._follower = role if isinstance(role, Follower) else None
        self._main_topic = role.main_topic if isinstance(role, SeveralTopics) else None
        self._consumer = consumer
        self._settings = settings
        self._lanes: dict[TP, Lane] = {}
        self._assigned = False
        #: Since when a rebalance keeps partitions from being live, in s of the monotonic clock; None = it does not.
        self._interrupted_at: float | None = None
        self.with_room = _WithRoom(self._lanes)

    def assign(self, tps: set[TP], standbys: Collection[TP] = ()) -> None:
        """Start a lane for each of these partitions, and follow the others; what is neither is forgotten.

        Args:
            tps: input partitions.
            standbys: changelog partitions whose input another node has.
        """
        self._role.retain({*tps, *standbys})
        if self._follower is not None:
            self._follower.follow(standbys)
        self._assigned = True
        log.info("partitions_assigned", partitions=[self._label(tp) for tp in self._in_order(tps)])
        for tp in sorted(tps):
            self._lanes[tp] = Lane(tp, self._role, self._consumer, self._settings, self._note_live)

    def _note_live(self) -> None:
        """Tell once after each rebalance how long it has kept this node from its work."""
        if self._interrupted_at is not None and self.ready:
            pause_ms = round((time.monotonic() - self._interrupted_at) * 1000)
            log.info("partitions_live", count=len(self._lanes), pause_ms=pause_ms)
            self._interrupted_at = None

    def offer(self, tp: TP, start: int, records: Sequence[Any]) -> None:
        """Hand fetched records to the lane of their partition, with the start of it that they were fetched after."""
        if tp in self._lanes:
            self._lanes[tp].offer(start, records)

    def report(self, tp: TP, status: str) -> None:
        """Tell how far the opening of a partition has come: a role calls it from its `open`."""
        if tp in self._lanes:
            self._lanes[tp].report(status)

    def lose_position(self, tp: TP) -> None:
        """Tell a lane that the log does not hold its position."""
        if tp in self._lanes:
            self._lanes[tp].lose_position()

    async def end(self) -> None:
        """End all lanes within the bound for revoked partitions, and follow nothing any more."""
        self._assigned = False
        lanes = list(self._lanes.values())
        started = time.monotonic()
        self._interrupted_at = self._interrupted_at or started
        ending = [lane.end(self._settings.revoke_timeout_ms / 1000) for lane in lanes]
        if self._follower is not None:
            ending.append(self._follower.unfollow())
        await asyncio.gather(*ending)
        if lanes:
            log.info("partitions_released", count=len(lanes), duration_ms=round((time.monotonic() - started) * 1000))
        self._lanes.clear()

    async def aclose(self) -> None:
        """End all lanes and forget all state."""
        await self.end()
        self._role.retain(())

    @property
    def ready(self) -> bool:
        """Whether partitions were assigned (none is an assignment too) and all of them are live."""
        return self._assigned and all(lane.live for lane in self._lanes.values())

    @property
    def assigned(self) -> bool:
        """Whether the group has told which partitions are ours, be it none."""
        return self._assigned

    def copies(self) -> Mapping[int, str]:
        """What the copy of each followed partition is doing, by partition number."""
        return self._follower.copies() if self._follower is not None else {}

    @property
    def faults(self) -> list[StamplineError]:
        """What partitions that are not live failed with, where it was an error of ours."""
        return [lane.fault for lane in self._lanes.values() if lane.fault is not None]

    @property
    def ended(self) -> bool:
        """Whether a lane has ended though nobody asked it to."""
        return any(lane.ended for lane in self._lanes.values())

    def status(self) -> dict[Label, str]:
        """What each partition is doing, by label; those of the main topic come first."""
        return {self._label(tp): self._lanes[tp].status for tp in self._in_order(self._lanes)}

    def _label(self, tp: TP) -> Label:
        return label(self._settings, self._main_topic, tp)

    def _in_order(self, tps: Iterable[TP]) -> list[TP]:
        return sorted(tps, key=lambda tp: (tp.topic != self._main_topic, tp))


class _WithRoom:
    """The partitions to fetch, as a live view that aiokafka's fetcher looks into from its own thread."""

    def __init__(self, lanes: Mapping[TP, Lane]) -> None:
        self._lanes = lanes

    def __contains__(self, tp: object) -> bool:
        lane = self._lanes.get(tp)  # type: ignore[call-overload] # fetchers ask for nothing but partitions
        return lane is not None and lane.has_room


async def _pause(attempt: int) -> None:
    """Wait with full jitter before trying again."""
    most = min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2 ** min(attempt, 16))
    await asyncio.sleep(random.uniform(_BACKOFF_BASE_SECONDS / 2, most))

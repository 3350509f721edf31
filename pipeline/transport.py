"""The batch transport: Faust's consumer, but one event is a whole record batch of one partition, and commit is ours.

Faust hands an agent one record at a time and commits when the loop body ends, which is slow and loses data (see the
README). Here the road of a record is::

    aiokafka's fetcher (its own thread)
      → BatchConsumer._drain_messages   takes what was fetched, only for lanes that have room
      → Lane                            gathers it; as soon as the batch before is done, delivers all it has
      → Faust's conductor and stream    one event whose value is a `Batch`
      → the agent                       `batch.start(process)`
      → Lane                            waits for `process`; repeats, reopens or gives up the partition on errors

Nothing here commits: `process` does, in the transaction that holds its outputs. Faust's own commit commits nothing.
A lane's failure is its own: the other partitions go on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Container, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, cast

import faust
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.group_coordinator import OffsetAndMetadata
from aiokafka.errors import (
    CommitFailedError,
    ConsumerStoppedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from pipeline.errors import PartitionFenced, ServiceUnavailable
from pipeline.kafka import kafka_errors, kafka_options
from pipeline.lanes import Batch, Lanes, Role
from pipeline.settings import Settings

#: Most bytes that one fetch brings for one partition, and in all.
_PARTITION_FETCH_BYTES = 8 * 2**20
_FETCH_BYTES = 32 * 2**20
#: Longest a fetch waits for a first record, in ms: a partition left out of it waits so long at most.
_FETCH_WAIT_MS = 100
_POLL_SECONDS = 1.0
#: A member that is assigned partitions so often in a row without a rebalance between is not alone in having its name.
#: A range to draw from, lest both give way.
_SAME_GENERATION_MAX = (5, 10)


class BatchApp(Protocol):
    """What the transport needs of the Faust app that it serves."""

    settings: Settings
    role: Role
    #: Whether the broker has transactions: all but the embedded one.
    transactions: bool


class LogRange(NamedTuple):
    """What the log of a partition holds, and what this group has committed of it.

    `begin` is its first offset, `end` the one after its last (None = the broker does not tell), `committed` is None
    where nothing was committed yet.
    """

    begin: int
    end: int | None
    committed: int | None

    def ends_before(self, position: int) -> bool:
        """Whether the log is shorter than what was read of it: it is another log by the same name."""
        return self.end is not None and position > self.end


class Reach(NamedTuple):
    """How far a partition has been fetched.

    `position` is the offset that the next fetch asks for, past the markers of transactions; `taken` is the offset after
    the last record that was handed to the lane since its start, None = none was. `end` is the last stable offset, as
    the fetch told it that was answered `age_seconds` ago.
    """

    position: int
    taken: int | None
    end: int
    age_seconds: float


class Fetched(NamedTuple):
    """Records of one partition, and after which start of it they were fetched."""

    tp: TP
    start: int
    records: Sequence[Any]


class BatchSchema(faust.Schema[Any, Any]):
    """Passes a batch through as the value of a Faust event: decoding is the agent's business."""

    def compile(self, app: Any, **_options: Any) -> Callable[..., Awaitable[Any]]:
        """Return the function that makes an event of a message."""

        async def decode(message: Any, **_options: Any) -> Any:
            return app.create_event(None, message.value, message.headers, message)

        return decode


class BatchConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread with a consumer of our own making."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._starts: Counter[TP] = Counter()
        #: The offset after the last record that was handed out since the start, of partitions that had one.
        self._taken: dict[TP, int] = {}

    @property
    def batch_app(self) -> BatchApp:
        """The app, as what it is."""
        return cast("BatchApp", self.consumer.app)

    def _create_worker_consumer(self, _transport: Any) -> AIOKafkaConsumer:
        app = self.consumer.app
        settings = self.batch_app.settings
        session_ms = settings.kafka_session_timeout_ms
        return AIOKafkaConsumer(
            **kafka_options(settings),
            group_id=app.conf.id,
            # A static member does not say goodbye: its partitions wait for it as long as a session.
            group_instance_id=settings.kafka_group_instance_id,
            partition_assignment_strategy=[app.assignor],
            enable_auto_commit=False,
            # Positions are ours: a position that the log does not hold must be an error, never a jump.
            auto_offset_reset="none",
            isolation_level="read_committed",
            max_poll_records=settings.batch_records_max,
            max_partition_fetch_bytes=_PARTITION_FETCH_BYTES,
            fetch_max_bytes=_FETCH_BYTES,
            fetch_max_wait_ms=_FETCH_WAIT_MS,
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=session_ms // 4,
            # The embedded broker lets a first member wait for half of this, whatever comes.
            rebalance_timeout_ms=2 * settings.revoke_timeout_ms + (session_ms if self.batch_app.transactions else 0),
        )

    async def on_start(self) -> None:
        """Start the consumer."""
        with kafka_errors(self.batch_app.settings):
            await super().on_start()
        # With a pause here, one partition whose lane is busy would hold up the fetches of all others.
        self._ensure_consumer()._fetcher._prefetch_backoff = 0  # noqa: SLF001

    async def start_at(self, tp: TP, offset: int) -> int:
        """Seek, and return the number of this start: only records with this number were fetched after it."""
        return cast("int", await self.call_thread(self._start_at, tp, offset))

    async def _start_at(self, tp: TP, offset: int) -> int:
        self._ensure_consumer().seek(TopicPartition(*tp), offset)
        self._starts[tp] += 1
        self._taken.pop(tp, None)
        return self._starts[tp]

    async def fetch(self, partitions: Container[TP]) -> list[Fetched]:
        """Take what was fetched of these partitions; wait a while for a first record."""
        return cast("list[Fetched]", await self.call_thread(self._fetch, partitions))

    async def _fetch(self, partitions: Container[TP]) -> list[Fetched]:
        consumer = self._ensure_consumer()
        records = await self._fetch_records(
            consumer,
            cast("set[TP]", partitions),
            timeout=_POLL_SECONDS,
            max_records=self.batch_app.settings.batch_records_max,
        )
        # Nothing was awaited since the records were taken, so no seek can have come between, nor a `_reaches`.
        self._taken.update((TP(*tp), taken[-1].offset + 1) for tp, taken in records.items() if taken)
        return [Fetched(TP(*tp), self._starts[TP(*tp)], taken) for tp, taken in records.items()]

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> None:
        """Commit positions as a plain consumer, for hops without a transaction."""
        consumer = self._ensure_consumer()
        # Faust's TP is not the tuple that aiokafka asks for.
        positions = {TopicPartition(*tp): OffsetAndMetadata(offset, "") for tp, offset in offsets.items()}
        await self.call_thread(consumer.commit, positions)

    async def log_range(self, tp: TP) -> LogRange:
        """Return what the log of a partition holds, and what this group has committed of it."""
        return cast("LogRange", await self.call_thread(self._log_range, tp))

    async def _log_range(self, tp: TP) -> LogRange:
        consumer = self._ensure_consumer()
        begin = (await consumer.beginning_offsets([tp]))[tp]
        end: int | None = (await consumer.end_offsets([tp]))[tp]
        if end and not self.batch_app.transactions:
            end = None  # The embedded broker tells the base of its last batch; only 0 can be believed.
        return LogRange(begin, end, await consumer.committed(tp))

    async def reaches(self, tps: Collection[TP]) -> dict[TP, Reach]:
        """Return how far these partitions have been fetched; without those that no fetch has told of yet."""
        return cast("dict[TP, Reach]", await self.call_thread(self._reaches, tps))

    async def _reaches(self, tps: Collection[TP]) -> dict[TP, Reach]:
        subscription = self._ensure_consumer()._subscription.subscription  # noqa: SLF001
        found = {}
        for tp in tps:
            state = subscription.assignment.state_value(tp) if subscription and subscription.assignment else None
            # The public way to the position waits where there is none.
            if state is not None and state.has_valid_position and state.lso is not None:
                age_seconds = max(0.0, time.time() - state.timestamp / 1000)
                found[tp] = Reach(state.position, self._taken.get(tp), state.lso, age_seconds)
        return found

    def coordinator_tasks(self) -> list[asyncio.Task[None]]:
        """The tasks that keep this consumer in its group; one that ends leaves a consumer that sits idle for ever."""
        coordinator = getattr(self._consumer, "_coordinator", None)
        return [task for task in (getattr(coordinator, "_coordination_task", None),) if task is not None]

    @property
    def group_error(self) -> KafkaError | None:
        """What keeps this consumer out of its group, where it is nothing that aiokafka tries again by itself.

        Its coordinator waits until somebody has looked at the error, which Faust never does: without `join_again` it
        would wait for ever, and its process would look alive.
        """
        coordinator = getattr(self._consumer, "_coordinator", None)
        return getattr(coordinator, "_pending_exception", None)

    def join_again(self) -> None:
        """Let the coordinator go on after such an error. Callable from any thread."""
        self.thread_loop.call_soon_threadsafe(self._join_again)

    def _join_again(self) -> None:
        with suppress(KafkaError):
            self._ensure_consumer()._coordinator.check_errors()  # noqa: SLF001

    def wake(self) -> None:
        """Let a waiting `getmany` look again: a lane has room. Callable from any thread."""
        self.thread_loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        fetcher = self._ensure_consumer()._fetcher  # noqa: SLF001
        for waiter in list(fetcher._fetch_waiters):  # noqa: SLF001
            fetcher._notify(waiter)  # noqa: SLF001


class BatchConsumer(driver.Consumer):
    """Faust's consumer: delivers batches through lanes, seeks to the role's positions, and commits nothing itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app = self.thread.batch_app
        self.lanes = Lanes(app.role, self, app.settings)
        self._generations: deque[int] = deque(maxlen=random.randint(*_SAME_GENERATION_MAX))

    def _new_consumer_thread(self) -> BatchConsumerThread:
        return BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    @property
    def thread(self) -> BatchConsumerThread:
        """The thread that talks to Kafka."""
        return cast("BatchConsumerThread", self._thread)

    async def _drain_messages(self, fetcher: Any) -> None:
        try:
            while not (self.should_stop or fetcher.should_stop):
                if not self.flow_active:
                    await self.wait(self.can_resume_flow.wait())
                    continue
                for tp, start, records in await self._fetch():
                    self.lanes.offer(tp, start, records)
        except ConsumerStoppedError:
            if not self.app.should_stop:
                raise

    async def _fetch(self) -> Sequence[Fetched]:
        try:
            return await self.thread.fetch(self.lanes.with_room)
        except NoOffsetForPartitionError:
            # aiokafka looked for a committed offset before the lane had told its own position.
            return ()
        except OffsetOutOfRangeError as exc:
            for tp in exc.args[0]:
                self.lanes.lose_position(tp)
            return ()

    async def start_at(self, tp: TP, offset: int) -> int:
        """Seek, and return the number of this start; what was fetched before it comes with another number."""
        return await self.thread.start_at(tp, offset)

    async def deliver(self, batch: Batch) -> None:
        """Send a batch through Faust to the agent."""
        last = batch.records[-1]
        await self.callback(
            ConsumerMessage(
                batch.tp.topic,
                batch.tp.partition,
                last.offset,
                last.timestamp / 1000.0,
                last.timestamp_type,
                [],
                None,
                cast("bytes", batch),
                None,
                tp=batch.tp,
                generation_id=self.app.consumer_generation_id,
            )
        )

    async def log_range(self, tp: TP) -> LogRange:
        """Return what the log of a partition holds, and what this group has committed of it.

        Raises:
            ServiceUnavailable: Kafka does not answer.
        """
        with kafka_errors(self.thread.batch_app.settings, topic=tp.topic):
            return await self.thread.log_range(tp)

    async def reaches(self, tps: Collection[TP]) -> dict[TP, Reach]:
        """Return how far these partitions have been fetched; without those that no fetch has told of yet."""
        return await self.thread.reaches(tps)

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> None:
        """Commit positions outside a transaction.

        Raises:
            PartitionFenced: the group has moved on.
            ServiceUnavailable: Kafka did not confirm it.
        """
        try:
            await self.thread.commit_offsets(offsets)
        except (CommitFailedError, IllegalStateError) as exc:
            raise PartitionFenced from exc
        except KafkaError as exc:
            raise ServiceUnavailable(f"offsets were not committed: {exc}") from exc

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:  # noqa: FBT001, FBT002
        """Commit nothing: a batch's own transaction does."""
        return False

    async def perform_seek(self) -> None:
        """Seek nothing: each lane seeks when it has opened."""

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """Start a lane for each input partition. Opening them happens beside the heartbeats, not here.

        Changelog partitions come along with their input's. Those of the standbys come alone: they are followed.
        """
        self._generations.append(generation_id)
        await super().on_partitions_assigned(assigned, generation_id)
        # Faust names standbys of every input; only a table has something to keep.
        standbys = {tp for tp in self.app.assignor.assigned_standbys() if self._is_changelog_tp(tp)}
        self.lanes.assign({tp for tp in assigned if not self._is_changelog_tp(tp)}, standbys)

    @property
    def has_namesake(self) -> bool:
        """Whether another process seems to use the same `KAFKA_GROUP_INSTANCE_ID`.

        The broker then gives the one name's partitions to whichever process asked last, and the other one asks again,
        without a rebalance: the generation stays the same. Kafka's answer to the loser, that it is fenced, does not
        reach aiokafka, whose heartbeats do not carry the name.
        """
        return len(self._generations) == self._generations.maxlen and len(set(self._generations)) == 1

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """End every lane, and follow nothing any more, within the bound before the partitions go."""
        self.stop_flow()
        await self.lanes.end()
        await super().on_partitions_revoked(revoked)

    async def on_stop(self) -> None:
        """End every lane, then leave the group."""
        self.stop_flow()
        await self.lanes.aclose()
        await super().on_stop()

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Say nothing: Faust judges by its own commits; a lane's state says more."""


class Transport(driver.Transport):
    """The transport behind `batch://` broker urls."""

    Consumer = BatchConsumer
    driver_version = f"batch over {driver.Transport.driver_version}"
